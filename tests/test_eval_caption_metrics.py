"""BLEU and CIDEr against recorded outputs of pycocoevalcap 1.2, and the tokenizer against CoreNLP's.

How the fixtures were made: `pip install pycocoevalcap==1.2`, its `PTBTokenizer` (stanford-corenlp-3.4.1.jar, Java 17)
over both sides, then `Bleu(4).compute_score` and `Cider().compute_score`. The plain CIDEr is `cider_scorer.py` of
github.com/vrama91/cider. Besides these lines the tokenizer was compared on 28,410 captions of ten sources (24,000 of
them people's sentences of Abstract-50S) and gave the same words for all of them.
"""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cm3.errors import DataError
from cm3.eval.caption_metrics import bleu, bleu_counts, bleu_of_counts, cider
from cm3.eval.caption_words import caption_words
from cm3.eval.report import of_sums

# A caption, and below it what PTBTokenizer makes of it without pycocoevalcap's punctuation.
PTB = r"""
A man, holding a dog's leash (red); isn't it "nice"?
    a man holding a dog 's leash -lrb- red -rrb- is n't it nice
He can't, won't, don't, shouldn't've gone. I'll we've they're I'm he'd it's
    he ca n't wo n't do n't should n't 've gone i 'll we 've they 're i 'm he 'd it 's
cannot gonna wanna gotta gimme lemme whatcha dunno 'tis 'twas
    can not gon na wan na got ta gim me lem me whatcha dunno 't is 't was
The dogs' bowls are by the men's room. rock 'n' roll 'n fish'n'chips
    the dogs bowls are by the men 's room rock 'n' roll 'n fish 'n' chips
A t-shirt, black-and-white photo; a 3-year-old girl -- running - fast — really – yes
    a t-shirt black-and-white photo a 3-year-old girl running fast really yes
Mr. Smith and Mrs. Jones vs. Dr. Who at St. Mary's in the U.S. and the U.S.A.
    mr. smith and mrs. jones vs. dr. who at st. mary 's in the u.s. and the u.s.a.
A sign that says "STOP!" and 'GO' on it.
    a sign that says stop and go on it
A cat... and a dog. . . end…
    a cat and a dog end
and/or his/her w/ a b/w photo 24/7 9/11
    and/or his/her w / a b/w photo 24/7 9/11
[brackets] {curly} (round) <angle> * star ~ tilde
    -lsb- brackets -rsb- -lcb- curly -rcb- -lrb- round -rrb- <angle> * star ~ tilde
^ hat | pipe \ back_slash under_score = equals + plus
    ^ hat | pipe \ back_slash under_score = equals + plus
It's 5'10" tall and 6" wide 90's 1990s '90s the '80s
    it 's 5 10 tall and 6 wide 90 's 1990s '90s the '80s
O'Brien's d'Artagnan l'homme ma'am o'clock y'all y'all'll
    o'brien 's d'artagnan l'homme ma'am o'clock y' all y' all 'll
No. 5 is on Main St. near Fifth Ave. approx. 5 ft. long, etc.
    no. 5 is on main st. near fifth ave. approx 5 ft. long etc.
etc.
    etc.
Jr. Sr. Co. Inc. Ltd. Corp. Jan. Feb. e.g. i.e. p.m.
    jr. sr. co. inc. ltd. corp. jan. feb. e.g. i.e. p.m.
“curly quotes” ‘single curly’ don’t it’s
    curly quotes single curly do n't it 's
A 2.5-inch long x 3.5 cm .5 -5 +5 1. 2) 3.
    a 2.5-inch long x 3.5 cm .5 -5 +5 1 2 -rrb- 3
50s 1st 2nd 3rd 21st-century twenty-one 100% 3D 4x4 4 x 4 A4 2x4s
    50s 1st 2nd 3rd 21st-century twenty-one 100 % 3d 4x4 4 x 4 a4 2x4s
café naïve über señor 日本 emoji 😀 text
    café naïve über señor 日本 emoji text
a,b a;b a:b a.b a!b a?b a-b a--b a'b a"b
    a b a b a b a.b a!b a?b a-b a b a b a b
C'mon let's that's who's there's she's o' d'you D'ye more'n
    c'mon let 's that 's who 's there 's she 's o d'you d'ye more 'n
A woman in a red dress(long) walks.
    a woman in a red dress -lrb- long -rrb- walks
Rock&roll AT&T Q&A R&B B&B black & white &amp; &lt; &gt;
    rock & roll at&t q&a r&b b&b black & white & < >
£5 €10 ¥100 $1.5 million 25¢ 20°C 20° 5'
    # 5 $ 10 ¥ 100 $ 1.5 million 25 cents 20 ° c 20 ° 5
Ph.D. B.A. a.k.a. J. K. Rowling J.K. Rowling P.S. A. B. C.
    ph.d. b.a. a.k.a. j. k. rowling j.k. rowling p.s. a. b. c.
v. vs fig. al. pp. dept. univ. mt. ft. lbs. oz. in. cm. no. sq. min. max. hr. sec.
    v. vs fig al. pp dept. univ. mt. ft. lbs oz in cm no sq. min max hr sec
wi-fi T.V. TV's DVD's CD/DVD N.Y. D.C. L.A. UK. U.K.
    wi-fi t.v. tv 's dvd 's cd/dvd n.y. d.c. l.a. uk u.k.
'cause 'em 'til 'bout 'round ol' goin' nothin' playin'
    'cause 'em 'til bout round ol' goin nothin playin
a man - a dog -- a cat --- a bird ---- end
    a man a dog a cat a bird end
#hashtag @user
    #hashtag @user
'Hello there', said the man's 'friend'.
    hello there said the man 's friend
whaddya gotcha kinda sorta oughta hafta
    whaddya gotcha kinda sorta oughta hafta
aa. bb. cc
    aa bb cc
Sat. Sun. Mon. Tues. Sept. Oct. Nov. Dec. sat. on a mat. the sun. march. may.
    sat sun mon. tues. sept. oct. nov. dec. sat on a mat the sun march may
The man sat. The sun. in the sun.
    the man sat the sun in the sun
mr smith mr. smith mrs. st. street. ave. blvd. rd. dr. gov. sen. rep. gen. lt. col. sgt. capt. prof. rev. hon. pres.
    mr smith mr. smith mrs. st. street ave. blvd. rd. dr. gov. sen. rep. gen. lt. col. sgt. capt. prof. rev. hon. pres.
yes!!! no??? ok?! ,, ;; ::
    yes !!! no ??? ok ?!
"""

REFERENCES = (
    (
        "A man is riding a brown horse on the beach.",
        "A man rides a horse along the sandy beach.",
        "Someone on a horse, near the water.",
        "A rider and his horse at the sea.",
        "A person riding horseback on a beach",
    ),
    (
        "Two dogs play with a red ball in the grass.",
        "Two dogs are chasing a ball.",
        "A pair of dogs running after a red ball on the lawn!",
        "The dogs don't see the cat.",
        "dogs playing",
    ),
    (
        "A bowl of fruit sits on a wooden table.",
        "There's a bowl with apples and bananas on the table.",
        "Fruit in a bowl (apples, bananas).",
    ),
    (
        "A large red circle left of a small blue square.",
        "a red circle to the left of a blue square on a white background",
    ),
    (
        "A woman holding an umbrella in the rain.",
        "A woman with an umbrella walks down a rainy street.",
        "A lady's umbrella is blown by the wind.",
    ),
    (
        "A train traveling down the tracks.",
        "The train is on the tracks near a station.",
        "A passenger train at St. Pancras station at 10:30 a.m.",
    ),
    ("A cat sleeping on a couch.", "A cat is asleep on the sofa.", "The cat can't be bothered to move."),
    ("A plate of food with broccoli and rice.", "Broccoli, rice and meat on a white plate."),
)
CANDIDATES = (
    "a man riding a horse on a beach",
    "two dogs playing with a ball in the the the grass",
    "A bowl of fruit on a table.",
    "a large red circle left of a small blue square",
    "a person holding a dog",
    "a train on the tracks at a train station with people waiting on the platform and a clock",
    "cat",
    "A plate, with broccoli and rice!!",
)
BLEU = (0.7646215495959459, 0.6491024186505054, 0.49288331982094885, 0.3919178895924002)
CIDER_D = (
    1.83815234021588,
    1.372901982448147,
    2.3708174065790613,
    6.20917223188842,
    0.18572120150861088,
    0.3457455290960904,
    0.5830880491937079,
    3.3059859689548605,
)
PLAIN_CIDER = (
    1.8890601138114391,
    1.8386559315283098,
    2.5634977409495314,
    6.5100733742220935,
    0.21044969219119472,
    1.7143221584726767,
    0.9424694870512479,
    3.352222786497403,
)
BLEU_OF_FOUR, CIDER_D_OF_FOUR = (
    (0.9444444443919754, 0.8759915016843397, 0.6902519891497045, 0.5754073915693784),
    (1.7888195010087915, 1.382568464813065, 2.3563635813347026, 6.133566965705883),
)
BLEU_OF_ONE = (0.8749999997812503, 0.8660254035602003, 0.4999999998650797, 7.071067809859905e-05)


WORDS = [caption_words(text) for text in CANDIDATES]
WANTED = [[caption_words(text) for text in texts] for texts in REFERENCES]
LINES = PTB.strip("\n").split("\n")


@pytest.mark.parametrize(("text", "words"), list(zip(LINES[::2], LINES[1::2], strict=True)))
def test_words_are_those_of_the_ptb_tokenizer(text, words):
    assert caption_words(text) == words.split()


@given(st.text(max_size=60))
def test_words_are_lower_case_without_blanks(text):
    words = caption_words(text)
    assert all(word and len(word.split()) == 1 for word in words)
    assert not set(words) & {".", ",", "!", "?", ":", ";", "-", "--", "...", "'", "''", "``", "`"}


def test_bleu_agrees_with_pycocoevalcap():
    assert bleu(WORDS, WANTED) == pytest.approx(BLEU, rel=1e-12)
    assert bleu(WORDS[:4], WANTED[:4]) == pytest.approx(BLEU_OF_FOUR, rel=1e-12)
    assert bleu(WORDS[:1], WANTED[:1]) == pytest.approx(BLEU_OF_ONE, rel=1e-12)


def test_cider_d_agrees_with_pycocoevalcap():
    assert cider(WORDS, WANTED) == pytest.approx(CIDER_D, rel=1e-12)


def test_plain_cider_agrees_with_its_authors():
    assert cider(WORDS, WANTED, "cider") == pytest.approx(PLAIN_CIDER, rel=1e-12)


def test_cider_depends_on_which_pictures_are_scored():
    few = cider(WORDS[:4], WANTED[:4])
    assert few == pytest.approx(CIDER_D_OF_FOUR, rel=1e-12)
    assert not np.allclose(few, cider(WORDS, WANTED)[:4], rtol=1e-3)


def test_a_single_picture_scores_zero_cider_however_good():
    assert cider(WANTED[3][:1], WANTED[3:4]).tolist() == [0.0]


def test_captions_equal_to_their_only_reference_score_ten():
    same = ["a red star on a hill".split(), "two small blue birds sing".split()]
    assert cider(same, [[words] for words in same]) == pytest.approx([10, 10])
    assert cider(same[:1] + [["other"]], [[same[0]], [same[1]]])[1] == 0


def test_cider_d_clips_repeats_and_plain_cider_does_not():
    references = [["a b c d".split()], ["e f g h".split()]]
    repeated = ["a a a a".split(), "e f g h".split()]
    # one-grams: clipped 1 of norm 4 times norm 2, others nothing: cosine 1 / 8, not 1 / 2; bigrams 3 on both sides
    assert cider(repeated, references)[0] == pytest.approx(10 / 4 * (1 / 8))
    assert cider(repeated, references, "cider")[0] == pytest.approx(10 / 4 * (1 / 2))


def test_the_length_in_the_penalty_is_the_number_of_bigrams():
    references = [["a b c d e".split()], ["v w x y z".split()]]
    one_word, no_word = cider([["a"], []], references), cider([[], []], references)
    # no bigrams against 4: exp(-16 / 72); one-gram cosine 1 / sqrt(5)
    assert one_word[0] == pytest.approx(10 / 4 * math.exp(-16 / 72) / math.sqrt(5))
    assert no_word.tolist() == [0.0, 0.0]


def test_sigma_sets_the_penalty():
    references = [["a b c d e".split()], ["v w x y z".split()]]
    wide = cider([["a"], ["v"]], references, sigma=1e9)
    assert wide == pytest.approx(2 * [10 / 4 / math.sqrt(5)])


def test_bleu_takes_the_closest_reference_length_and_the_shorter_of_two():
    ten = [["x"] * 3, ["x"] * 5]
    assert bleu_counts([["x"] * 4], [ten])[0, -2:].tolist() == [4, 3]
    assert bleu_counts([["x"] * 5], [ten])[0, -2:].tolist() == [5, 5]


def test_bleu_clips_by_the_reference_that_has_most():
    counts = bleu_counts(["the the the the".split()], [["the cat".split(), "the the dog".split()]])
    assert counts[0].tolist() == [2, 1, 0, 0, 4, 3, 2, 1, 4, 3]


def test_bleu_penalises_short_captions():
    assert bleu([["a", "b"]], [["a b c d".split()]])[0] == pytest.approx(math.exp(1 - 4 / 2), rel=1e-6)


def test_bleu_has_a_bootstrap_interval():
    counts = bleu_counts(WORDS, WANTED)
    estimates = of_sums(counts, bleu_of_counts)
    assert [estimate.value for estimate in estimates] == bleu(WORDS, WANTED)
    assert all(estimate.low < estimate.value < estimate.high and estimate.count == 8 for estimate in estimates)
    certain = of_sums(np.repeat(counts[3:4], 5, axis=0), bleu_of_counts)[0]
    assert certain.low == pytest.approx(certain.high) == pytest.approx(1)


def test_missing_references_are_named():
    with pytest.raises(DataError, match="picture 1 has no reference; leave out the 1 pictures"):
        cider([["a"], ["b"]], [[["a"]], []])
    with pytest.raises(DataError, match="2 captions for 1 pictures; give one caption for each"):
        bleu([["a"], ["b"]], [[["a"]]])
