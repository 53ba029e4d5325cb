"""Best of N: rank the samples of a prompt, by the model's own likelihood or any other scores (CM3Leon section 3.1)."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Integer

from cm3.errors import RequestError
from cm3.generation.engine import Engine
from cm3.generation.prompts import Codes, Prompts
from cm3.generation.request import Request
from cm3.model.transformer import Transformer
from cm3.tokenizers.vocabulary import Vocabulary


def own_likelihood(
    model: Transformer,
    vocabulary: Vocabulary,
    requests: Sequence[Request],
    new_ids: Sequence[Sequence[Integer[np.ndarray, " _"]]],
) -> list[list[float]]:
    """How likely the model finds what it made: the mean log-probability (nats) per new id after the prompt.

    Taken over the whole vocabulary without guidance, temperature or cuts, so that samples drawn in different
    ways can be compared. The mean does not favour short texts.

    Args:
        new_ids: of every sample of every request, as `Engine.run` returns them.
    """
    sequences = [
        (request.prompt_ids, ids.tolist())
        for request, samples in zip(requests, new_ids, strict=True)
        for ids in samples
    ]
    scores = iter(Engine(model, vocabulary).score(sequences))
    return [[next(scores) / len(ids) for ids in samples] for samples in new_ids]


def caption_likelihood(
    model: Transformer,
    prompts: Prompts,
    texts: Sequence[Sequence[int]],
    images: Sequence[Codes],
) -> list[float]:
    """How likely the model finds each text as the caption of its image: mean log-probability (nats) per id.

    The same weights read what they drew: `</s> <sentinel:0> <break> image </s> <sentinel:0>` text `<eoss>`.

    Args:
        texts: piece ids, one text for each image.
    """
    vocabulary = prompts.vocabulary
    sequences = []
    for text, codes_HW in zip(texts, images, strict=True):
        request = prompts.infill_text([], [], codes_HW, max_new_tokens=1)
        caption_ids = vocabulary.text_to_ids(np.asarray(text, dtype=np.int64)).tolist()
        sequences.append((request.prompt_ids, [*caption_ids, vocabulary.eoss_id]))
    scores = Engine(model, vocabulary).score(sequences)
    return [score / len(ids) for score, (_, ids) in zip(scores, sequences, strict=True)]


def choose(scores_by_ranker: Mapping[str, Sequence[float]], weights: Mapping[str, float] | None = None) -> int:
    """The index of the best sample of one prompt; the first of equally good ones.

    Rankers have scales of their own, so each one's scores are brought to mean 0 and standard deviation 1 over
    the samples before they are added up.

    Args:
        scores_by_ranker: for each ranker the scores of the samples, higher is better.
        weights: of the rankers; None: all the same.

    Raises:
        RequestError: there is nothing to choose from, the rankers scored different numbers of samples, a score is
            not finite, or the weights are not those of the rankers.
    """
    lengths = {name: len(scores) for name, scores in scores_by_ranker.items()}
    if len(set(lengths.values())) != 1 or 0 in lengths.values():
        raise RequestError(f"numbers of scored samples by ranker are {lengths}; give equally many, and at least one")
    if weights is not None and weights.keys() != lengths.keys():
        raise RequestError(f"there are weights for {sorted(weights)}, but scores by {sorted(lengths)}; give the same")
    pooled = np.zeros(next(iter(lengths.values())))
    for name, values in scores_by_ranker.items():
        scores = np.asarray(values, dtype=np.float64)
        if not np.isfinite(scores).all():
            raise RequestError(f"ranker {name!r} has the scores {scores.tolist()}; they must be finite numbers")
        if scores.max() > scores.min():
            pooled += (1.0 if weights is None else weights[name]) * (scores - scores.mean()) / scores.std()
    return int(pooled.argmax())
