"""The parts of a block: norms, rotary positions, attention and feed-forward, without biases.

B batch   T tokens   D width   N query heads   G key/value heads   K head width   F feed-forward width
"""

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from cm3.model.attention import Backend, attend
from cm3.model.cache import LayerCache
from cm3.model.config import ModelConfig
from cm3.model.masks import AttentionMask, CacheMask


class Norm(nn.Module):
    """LayerNorm without weight and bias (CM3Leon) or RMSNorm with weight (Chameleon).

    The fused kernels take their statistics in float32 whatever the input's type.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.epsilon = config.norm_epsilon
        self.shape = [config.width]
        self.weight = nn.Parameter(torch.ones(config.width)) if config.norm == "rmsnorm" else None

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if self.weight is None:
            return F.layer_norm(x_BTD, self.shape, eps=self.epsilon)
        return F.rms_norm(x_BTD, self.shape, self.weight.to(x_BTD.dtype), self.epsilon)


class HeadNorm(nn.Module):
    """LayerNorm over each head with a weight and bias for every head.

    Chameleon 34B was trained in shards that normalised their own heads, so that its heads differ. Weight and bias are
    vectors because the optimiser decays whatever has two dimensions.
    """

    def __init__(self, num_heads: int, head_width: int, epsilon: float) -> None:
        super().__init__()
        self.shape = [num_heads, head_width]
        self.epsilon = epsilon
        self.weight = nn.Parameter(torch.ones(num_heads * head_width))
        self.bias = nn.Parameter(torch.zeros(num_heads * head_width))

    def forward(self, x_BTNK: Float[Tensor, "B T N K"]) -> Float[Tensor, "B T N K"]:
        normal_BTNK = F.layer_norm(x_BTNK, self.shape[1:], eps=self.epsilon)
        return normal_BTNK * self.weight.view(self.shape) + self.bias.view(self.shape)


def _qk_norm(config: ModelConfig, num_heads: int) -> nn.Module | None:
    if not config.qk_norm:
        return None
    if config.qk_norm_per_head:
        return HeadNorm(num_heads, config.head_width, config.norm_epsilon)
    return nn.LayerNorm(config.head_width, eps=config.norm_epsilon)


def rotary_table(positions_BT: Int[Tensor, "B T"], head_width: int, theta: float) -> Complex[Tensor, "B T 1 half"]:
    """Rotations of RoPE (arXiv:2104.09864, equation 13) as unit complex numbers, made once per forward pass.

    Computed from the positions in float32, so that no buffer can lose precision with the model's type.
    """
    even_half = torch.arange(0, head_width, 2, device=positions_BT.device, dtype=torch.float32)
    angle_BT1half = positions_BT[..., None, None].float() * theta ** (-even_half / head_width)
    return torch.polar(torch.ones_like(angle_BT1half), angle_BT1half)


def rotate(x_BTNK: Float[Tensor, "B T N K"], rotary_BT1half: Tensor) -> Float[Tensor, "B T N K"]:
    """Rotate each adjacent pair of every head's elements (Meta's order, Chameleon's weights), in float32."""
    pairs_BTNhalf = torch.view_as_complex(x_BTNK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_BTNhalf * rotary_BT1half).flatten(-2).to(x_BTNK.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.key_value_heads, config.key_value_heads)
        self.head_width = config.head_width
        self.qkv = nn.Linear(config.width, sum(self.heads) * self.head_width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = _qk_norm(config, config.num_heads)
        self.k_norm = _qk_norm(config, config.key_value_heads)

    def forward(
        self,
        x_BTD: Float[Tensor, "B T D"],
        *,
        mask: AttentionMask,
        rotary_BT1half: Tensor | None,
        cache: LayerCache | None,
        backend: Backend,
    ) -> Float[Tensor, "B T D"]:
        heads_BTHK = self.qkv(x_BTD).unflatten(-1, (sum(self.heads), self.head_width))
        q_BTNK, k_BTGK, v_BTGK = heads_BTHK.split(self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNK, k_BTGK = self.q_norm(q_BTNK), self.k_norm(k_BTGK)
        if rotary_BT1half is not None:
            q_BTNK, k_BTGK = rotate(q_BTNK, rotary_BT1half), rotate(k_BTGK, rotary_BT1half)
        # Under autocast some devices return norms in float32; the products below want one type.
        q_BTNK, k_BSGK, v_BSGK = q_BTNK.to(v_BTGK.dtype), k_BTGK.to(v_BTGK.dtype), v_BTGK
        if cache is not None:
            assert isinstance(mask, CacheMask)
            k_BSGK, v_BSGK = cache.write(k_BSGK, v_BSGK, mask.slots_BT)
        out_BTNK = attend(q_BTNK, k_BSGK, v_BSGK, mask=mask, backend=backend)
        return self.out(out_BTNK.flatten(2))


class FeedForward(nn.Module):
    """Two matrices around ReLU or GELU, or SwiGLU (arXiv:2002.05202), gate and value in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        inner = 2 * config.ffn_width if config.activation == "swiglu" else config.ffn_width
        self.up = nn.Linear(config.width, inner, bias=False)
        self.out = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        inner = self.up(x_BTD)
        if self.activation == "swiglu":
            gate_BTF, value_BTF = inner.chunk(2, dim=-1)
            return self.out(F.silu(gate_BTF) * value_BTF)
        return self.out(F.relu(inner) if self.activation == "relu" else F.gelu(inner))
