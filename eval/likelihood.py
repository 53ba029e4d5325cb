"""How well a model predicts held-out documents: bits per image code, and per id and byte of text."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from cm3.eval.document_tasks import PairSet, caption_of, square_of
from cm3.eval.protocol import BOOTSTRAP, protocol
from cm3.eval.report import Estimate, TaskResult, ratio
from cm3.model.loss import next_token_loss
from cm3.pipeline import CM3


@dataclass(frozen=True, kw_only=True)
class Likelihood:
    """Negative log2-likelihood of `</s> text <break> image </s>`, read from left to right.

    `<break>` and `</s>` count with the text. Text comes first, so image codes are predicted given the caption.
    """

    pairs: PairSet
    """The held-out documents."""

    @torch.inference_mode()
    def run(self, model: CM3) -> TaskResult:
        start = time.monotonic()
        documents = self.pairs.open()
        image_range = model.tokenizer.vocabulary.image_range
        text_bits, image_bits, text_ids, text_bytes, image_codes = [], [], [], [], []
        for document, tokenized in zip(documents, model.tokenizer.tokenize(documents), strict=True):
            ids_BT = torch.as_tensor(model.tokenizer.to_ids(tokenized), device=model.device)[None]
            out = next_token_loss(model.transformer, ids_BT, image_range=(image_range.start, image_range.stop))
            text_bits.append(float(out.text_loss_sum) / math.log(2))
            image_bits.append(float(out.image_loss_sum) / math.log(2))
            text_ids.append(int(out.text_count))
            text_bytes.append(len(caption_of(document).encode()))
            image_codes.append(int(out.image_count))
        metrics: dict[str, Estimate] = {}
        for group, members in self.pairs.groups(documents):
            for name, bits, units in (
                ("bits per image code", image_bits, image_codes),
                ("bits per text id", text_bits, text_ids),
                ("bits per byte of text", text_bits, text_bytes),
            ):
                metrics[f"{name}, {group}"] = ratio([bits[i] for i in members], [units[i] for i in members])
        record = protocol(
            model,
            [caption_of(document) for document in documents],
            references=self.pairs.record(documents),
            preprocessing=square_of(model),
            retrieve=0,
            metrics={"bits": "-log2 p, left to right, text first; </s> and <break> count with the text"},
            interval=BOOTSTRAP,
        )
        return TaskResult("likelihood", metrics, record, time.monotonic() - start)
