"""The decoder-only transformer of CM3Leon (arXiv:2309.02591, section 2.3), with Chameleon's variations.

B batch   T tokens   D width   V joint vocabulary
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cm3.errors import ConfigError, RequestError
from cm3.model.attention import Backend
from cm3.model.cache import KeyValueCache, LayerCache
from cm3.model.config import ModelConfig
from cm3.model.cpu_step import CpuStep, fits
from cm3.model.layers import Attention, FeedForward, Norm, rotary_table, weight_product
from cm3.model.masks import AttentionMask, CausalMask, PackedMask, document_positions
from cm3.model.sequence_parallel import SharedRows


class Block(nn.Module):
    """Attention and feed-forward, each with a norm and a residual connection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_order = config.norm_order
        self.dropout = config.dropout
        self.attention_norm = Norm(config)
        self.attention = Attention(config)
        self.feed_forward_norm = Norm(config)
        self.feed_forward = FeedForward(config)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        mask: AttentionMask,
        rotary_BT1half: Tensor | None,
        cache: LayerCache | None,
        backend: Backend,
    ) -> Float[Tensor, "B T D"]:
        def attention(y_BTD: Tensor) -> Tensor:
            out_BTD = self.attention(y_BTD, mask=mask, rotary_BT1half=rotary_BT1half, cache=cache, backend=backend)
            return F.dropout(out_BTD, self.dropout, self.training)

        def feed_forward(y_BTD: Tensor) -> Tensor:
            return F.dropout(self.feed_forward(y_BTD), self.dropout, self.training)

        if self.norm_order == "swin":
            x_BTD = x_BTD + self.attention_norm(attention(x_BTD))
            return x_BTD + self.feed_forward_norm(feed_forward(x_BTD))
        x_BTD = x_BTD + attention(self.attention_norm(x_BTD))
        return x_BTD + feed_forward(self.feed_forward_norm(x_BTD))


class Transformer(nn.Module):
    """Token ids to hidden states; `logits` turns those into scores over the joint vocabulary.

    Attributes:
        activation_checkpointing: recompute every block in the backward pass, keep no activations in it.
        attention_backend: see `cm3.model.attention.attend`.
        refuses_training: why training mode is refused, for the error that says so; empty if it is not.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.activation_checkpointing = False
        self.attention_backend: Backend = "auto"
        self.refuses_training = ""
        self.embedding = nn.Embedding(config.vocabulary_size, config.width)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.max_positions, config.width) if learned else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.final_norm = Norm(config)
        self.head = None if config.tie_embeddings else nn.Linear(config.width, config.vocabulary_size, bias=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw all weights anew (CM3Leon section 2.3; metaseq for what the paper calls output layers)."""
        config = self.config
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                _truncated_normal(module.weight, config.init_std)
        if self.position_embedding is not None:
            _truncated_normal(self.position_embedding.weight, config.position_init_std)
        for block in self.modules():
            if not isinstance(block, Block):
                continue
            for output in (block.attention.out, block.feed_forward.out):
                if config.zero_init_outputs:
                    nn.init.zeros_(output.weight)
                else:
                    _truncated_normal(output.weight, config.init_std / (2 * config.num_layers) ** 0.5)

    def forward(
        self,
        ids_BT: Int[Tensor, "B T"],
        *,
        positions_BT: Int[Tensor, "B T"] | None = None,
        document_ids_BT: Int[Tensor, "B T"] | None = None,
        rows: SharedRows | None = None,
        cache: KeyValueCache | None = None,
        num_new_B: Int[Tensor, " B"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """Hidden states after the final norm.

        Args:
            positions_BT: default: position inside the document, or in the cache's row.
            document_ids_BT: packed rows; a run of equal ids is a document, seeing only itself; -1 is padding.
            rows: packed rows that several processes share, instead of `document_ids_BT`; the ids, and so the hidden
                states, are this process's part of them.
            cache: the ids continue its rows; it is extended by them.
            num_new_B: with a cache, the real tokens of each right-padded row; hidden states of padding mean
                nothing.

        Raises:
            ConfigError: for packed rows together with a cache, or rows longer than the model's context.
            RequestError: for more ids than the cache can hold.
        """
        if cache is not None and ids_BT.shape[1] == 1 and positions_BT is None and document_ids_BT is None:
            step = self._cpu_step(cache)
            if step is not None:
                return self._decode(ids_BT, cache, num_new_B, step)
        if positions_BT is None and cache is None and document_ids_BT is None and rows is None:
            self._check_length(ids_BT.shape[1])
        mask: AttentionMask
        if cache is not None:
            if document_ids_BT is not None or rows is not None:
                raise ConfigError("document_ids_BT and cache exclude each other; a cached row is one document")
            mask = cache.plan_step(ids_BT.shape[1], num_new_B)
            default_positions_BT = mask.positions_BT
        elif rows is not None:
            mask = rows
            self._check_length(rows.longest)
            default_positions_BT = rows.positions_BL
        elif document_ids_BT is not None:
            mask = PackedMask(document_ids_BT)
            self._check_length(mask.longest)
            default_positions_BT = document_positions(document_ids_BT)
        else:
            mask = CausalMask()
            default_positions_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        if positions_BT is None:
            positions_BT = default_positions_BT

        x_BTD = self.embedding(ids_BT)
        rotary_BT1half = None
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(positions_BT)
        else:
            rotary_BT1half = rotary_table(positions_BT, self.config.head_width, self.config.rope_theta)
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layer(index)
            arguments = (x_BTD, mask, rotary_BT1half, layer_cache, self.attention_backend)
            if self.activation_checkpointing and torch.is_grad_enabled() and cache is None:
                x_BTD = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x_BTD = block(*arguments)
        if cache is not None:
            cache.advance(ids_BT.shape[1], num_new_B)
        return self.final_norm(x_BTD)

    def _cpu_step(self, cache: KeyValueCache) -> CpuStep | None:
        """What takes the place of the blocks for one token a row, if there is something."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or self.attention_backend != "auto":
            return None
        if cache.cpu_step_model is not self:
            step = CpuStep(self, cache) if fits(self, cache) else None
            cache.cpu_step, cache.cpu_step_model = step, self
        return cache.cpu_step

    def _decode(
        self, ids_B1: Int[Tensor, "B 1"], cache: KeyValueCache, num_new_B: Int[Tensor, " B"] | None, step: CpuStep
    ) -> Float[Tensor, "B 1 D"]:
        x_BD = self.embedding(ids_B1[:, 0])
        if self.position_embedding is not None:
            last = self.config.max_positions - 1  # a full row that rests is behind it
            x_BD = x_BD + self.position_embedding(cache.lengths_B.clamp(max=last))
        hidden_BD = step(x_BD, cache.lengths_B)
        cache.advance(1, num_new_B)
        return hidden_BD.to(x_BD.dtype, copy=True)[:, None]

    def _check_length(self, longest: int) -> None:
        if longest > self.config.max_positions:
            raise ConfigError(
                f"a document of {longest} tokens was given, but model.max_positions="
                f"{self.config.max_positions}; shorten it or raise max_positions"
            )

    def train(self, mode: bool = True) -> "Transformer":
        """Put all parts in training or evaluation mode; RequestError before any of them changes, if that is refused."""
        if mode and self.refuses_training:
            raise RequestError(self.refuses_training)
        return super().train(mode)

    @property
    def head_weight_VD(self) -> Float[Tensor, "V D"]:
        """The output head: the embedding itself if tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def logits(
        self, hidden_BTD: Float[Tensor, "*B D"], id_range: tuple[int, int] | None = None
    ) -> Float[Tensor, "*B V"]:
        """Scores of the next id over the vocabulary, or over ids [start, stop) only (rows are not copied)."""
        weight_VD = self.head_weight_VD if id_range is None else self.head_weight_VD[slice(*id_range)]
        return weight_product(hidden_BTD, weight_VD)


def _truncated_normal(weight: Tensor, std: float) -> None:
    """Normal with mean 0, cut at 3 standard deviations; nothing on the meta device, which has no values."""
    if not weight.is_meta:
        nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)
