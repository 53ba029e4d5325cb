"""The words of a caption as pycocoevalcap sees them: Stanford's PTB tokenizer in lower case, punctuation left out.

The original is a Java program (`PTBTokenizer -preserveLines -lowerCase` of CoreNLP 3.4.1). This is a regular
expression for English captions with the same habits, the odd ones included: clitics are words of their own
("do n't"), abbreviations keep their full stop, brackets become words ("-lrb-") that the list of punctuation, being
in capitals, does not catch, and neither does it catch runs such as "!!". Scores shift when captions are split at
blanks instead (pycocoevalcap's README).
"""

from __future__ import annotations

import html
import re

_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|ave|blvd|rd|mt|ft|jr|sr|co|inc|ltd|corp|dept|univ|vs|etc|prof|rev|hon|gov|sen|rep|pres|gen|lt|"
    "col|sgt|capt|al|sq|jan|feb|aug|sept|oct|nov|dec|mon|tues"
)
"""Words whose full stop stays with them, for people, places, companies, months and days."""

_KEPT_APOSTROPHES = re.compile(r"(?:[dlo]'\w+|c'mon|ma'am)(?:-\w+)*", re.IGNORECASE)
"""Words with an apostrophe that is no clitic's, such as "o'clock"."""

_TOKEN = re.compile(
    rf"""
      https?://\S+ | www\.\S+ | [\w.+-]+@\w+(?:\.\w+)+   # addresses
    | </?\w+> | -(?i:[lr][rsc]b)-                             # tags, and brackets that are words already
    | [A-Z]+(?:&[A-Z]+)+                                 # AT&T; in capitals only
    | (?i:ph\.d\.) | (?:[^\W\d_]\.){{2,}}                # U.S.
    | \b[^\W\d_]\.(?!\w)                                 # J.
    | \b(?i:{_ABBREVIATIONS})\.(?!\w)
    | \b(?i:no)\.(?=\ ?\d)
    | \d+:\d\d(?=[ap]m\b)                                # 12:00pm is two words, 5pm is one
    | (?<!\S)[-+]?\.?\d\w*(?:[-/.,:']\w+)*               # numbers with what may stand inside them
    | '\d0s\b | (?<!\w)'(?:cause|em|til|n)\b'? | (?<!\w)'(?i:re|ve|ll|s|m|d|t)\b
    | [#@][^\W\d]\w*
    | \w+(?:[-/.!?']\w+|(?<=\d)[,:]\d+\w*)*(?:(?<=\bol)'|(?<=\bd)')?
    | [?!]{{2,}} | [()\[\]{{}}] | [$%\#&*~^|\\=+@/<>°¥€£¢½¼¾]
    """,
    re.VERBOSE,
)

_SPELLED = {
    "(": "-lrb-",
    ")": "-rrb-",
    "[": "-lsb-",
    "]": "-rsb-",
    "{": "-lcb-",
    "}": "-rcb-",
    "€": "$",
    "£": "#",
    "¢": "cents",
    "½": "1/2",
    "¼": "1/4",
    "¾": "3/4",
}
_PAIRS = {
    "cannot": ("can", "not"),
    "gonna": ("gon", "na"),
    "wanna": ("wan", "na"),
    "gotta": ("got", "ta"),
    "gimme": ("gim", "me"),
    "lemme": ("lem", "me"),
    "y'all": ("y'", "all"),
}
_CLITIC = re.compile(r"(.+?)(n't|'(?:s|m|d|re|ve|ll|n))")
_APOSTROPHES = str.maketrans({"’": "'", "‘": "'"})  # as PTB writes them


def caption_words(text: str) -> list[str]:
    """The words of a caption in lower case, without punctuation."""
    text = html.unescape(text).translate(_APOSTROPHES)
    text = re.sub(r"(?i)(?<!\w)'t(?=(?:is|was)\b)", "'t ", text)
    text = re.sub(r"(?i)(?<=\w)'n'(?=\w)", " 'n' ", text)
    words: list[str] = []
    for found in _TOKEN.finditer(text):
        word = _SPELLED.get(found[0], found[0].lower())
        words += _without_clitics(word) if word[0].isalnum() else [word]
    return words


def _without_clitics(word: str) -> list[str]:
    """A word and the clitics behind it, each for itself."""
    clitics: list[str] = []
    while found := _CLITIC.fullmatch(word):
        word = found[1]
        clitics.insert(0, found[2])
    if word in _PAIRS:
        return [*_PAIRS[word], *clitics]
    if "'" in word and not _KEPT_APOSTROPHES.fullmatch(word) and not word.endswith("'"):
        return [*word.replace("'", " ").split(), *clitics]
    return [word, *clitics]
