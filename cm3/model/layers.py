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
from cm3.model.cpu_gradients import RmsNorm, learns_on_cpu
from cm3.model.kernels import multiplies, multiply
from cm3.model.masks import AttentionMask, CacheMask

_HAS_MATRIX_TILES = torch.cpu._is_amx_tile_supported()
"""Whether the processor multiplies 16-bit matrices in tiles (Intel's AMX)."""

_TURNED_ROWS = range(2, 1025)
"""For which numbers of rows in bf16 with matrix tiles turned products were measured to be faster on a CPU."""

_PANEL_ROWS = range(4, 33) if torch.backends.mkl.is_available() else range(0)
"""For which numbers of rows in fp32 panels were."""

_MOST_PLAIN_ROWS = 12
"""More rows and the panels are turned, too."""

_PANEL = 32
"""Outputs of a panel."""


def weight_product(x_BD: Float[Tensor, "*B D"], weight_ND: Float[Tensor, "N D"]) -> Float[Tensor, "*B N"]:
    """`F.linear`; where rows are few and nothing is learned from them, in the way that a CPU reads the weights fastest.

    That is `cm3.model.kernels` where it could be compiled. torch's own kernels pack the weights anew at every call, if
    they are the right factor of a large product, `x @ weight.T`. So they are made the left one, which is taken as it
    lies in memory, `weight @ x.T`, or they are cut into panels, the small products of a batch. In 16 bit one row is a
    vector, which has a kernel of its own. The result need not be contiguous.
    """
    num_rows = x_BD.numel() // x_BD.shape[-1]
    if x_BD.device.type != "cpu" or torch.is_grad_enabled():
        return F.linear(x_BD, weight_ND)
    is_plain = not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu")
    is_plain = is_plain and x_BD.dtype == weight_ND.dtype and x_BD.shape[-1] == weight_ND.shape[1]
    if is_plain and multiplies(weight_ND, num_rows):
        return multiply(x_BD, weight_ND)
    if x_BD.dtype == torch.float32 and num_rows in _PANEL_ROWS and len(weight_ND) % _PANEL == 0:
        return _panel_product(x_BD.reshape(num_rows, -1), weight_ND).unflatten(0, x_BD.shape[:-1])
    is_tiled = x_BD.dtype == torch.bfloat16 and _HAS_MATRIX_TILES
    if is_tiled and num_rows == 1:
        return (weight_ND @ x_BD.flatten()).view(*x_BD.shape[:-1], -1)
    if is_tiled and num_rows in _TURNED_ROWS:
        return (weight_ND @ x_BD.reshape(num_rows, -1).t()).t().unflatten(0, x_BD.shape[:-1])
    return F.linear(x_BD, weight_ND)


def _panel_product(x_RD: Tensor, weight_ND: Tensor) -> Tensor:
    """`x @ weight.T`, or its transpose, as a batch of one product for each panel."""
    panels_PND = weight_ND.unflatten(0, (-1, _PANEL))
    if len(x_RD) <= _MOST_PLAIN_ROWS:
        out_PRN = torch.bmm(x_RD.expand(len(panels_PND), -1, -1), panels_PND.mT)
        return out_PRN.transpose(0, 1).flatten(1)
    x_DR = x_RD.t().contiguous()
    return torch.bmm(panels_PND, x_DR.expand(len(panels_PND), -1, -1)).flatten(0, 1).t()


class Linear(nn.Linear):
    """A product with a weight matrix, by `weight_product`."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__(width, outputs, bias=False)

    @property
    def matrix(self) -> tuple[Tensor, Tensor | None]:
        """Weights, and the scale of each row where they are of 8 bits."""
        return self.weight.detach(), None

    def forward(self, x_BD: Float[Tensor, "*B D"]) -> Float[Tensor, "*B N"]:
        return weight_product(x_BD, self.weight)


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
        weight_D = self.weight.to(x_BTD.dtype)
        if learns_on_cpu(x_BTD):
            return RmsNorm.apply(x_BTD, weight_D, self.epsilon)
        return F.rms_norm(x_BTD, self.shape, weight_D, self.epsilon)


class SharedHeadNorm(nn.LayerNorm):
    """LayerNorm over each head with one weight and bias for all heads; where it learns in 16 bit on a CPU, in float32.

    There the kernel would add up the gradients of weight and bias over all B T N rows in 16 bit, tens of per cent
    wrong. The rotation wants float32 anyway, so that this costs no time.
    """

    def forward(self, x_BTNK: Float[Tensor, "B T N K"]) -> Float[Tensor, "B T N K"]:
        if learns_on_cpu(x_BTNK) and x_BTNK.element_size() == 2:
            weight_K, bias_K = self.weight.float(), self.bias.float()
            return F.layer_norm(x_BTNK.float(), self.normalized_shape, weight_K, bias_K, self.eps)
        return super().forward(x_BTNK)


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
    return SharedHeadNorm(config.head_width, eps=config.norm_epsilon)


def rotary_table(positions_BT: Int[Tensor, "B T"], head_width: int, theta: float) -> Complex[Tensor, "B T 1 half"]:
    """Rotations of RoPE (arXiv:2104.09864, equation 13) as unit complex numbers, made once per forward pass.

    Computed from the positions in float32, so that no buffer can lose precision with the model's type.
    """
    even_half = torch.arange(0, head_width, 2, device=positions_BT.device, dtype=torch.float32)
    angle_BT1half = positions_BT[..., None, None].float() * theta ** (-even_half / head_width)
    return torch.polar(torch.ones_like(angle_BT1half), angle_BT1half)


def rotate(x_BTNK: Float[Tensor, "B T N K"], rotary_BT1half: Tensor) -> Float[Tensor, "B T N K"]:
    """Rotate each adjacent pair of every head's elements (Meta's order, Chameleon's weights), in float32.

    A complex product is one operation; compilers know real numbers alone and make one of theirs.
    """
    if torch.compiler.is_compiling():
        cosine_BT1half, sine_BT1half = torch.view_as_real(rotary_BT1half).unbind(-1)
        a_BTNhalf, b_BTNhalf = x_BTNK.float().unflatten(-1, (-1, 2)).unbind(-1)
        turned_a_BTNhalf = a_BTNhalf * cosine_BT1half - b_BTNhalf * sine_BT1half
        turned_b_BTNhalf = a_BTNhalf * sine_BT1half + b_BTNhalf * cosine_BT1half
        return torch.stack([turned_a_BTNhalf, turned_b_BTNhalf], dim=-1).flatten(-2).to(x_BTNK.dtype)
    pairs_BTNhalf = torch.view_as_complex(x_BTNK.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs_BTNhalf * rotary_BT1half).flatten(-2).to(x_BTNK.dtype)


class Attention(nn.Module):
    """Grouped-query attention with one fused projection for queries, keys and values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = (config.num_heads, config.key_value_heads, config.key_value_heads)
        self.head_width = config.head_width
        self.qkv = Linear(config.width, sum(self.heads) * self.head_width)
        self.out = Linear(config.width, config.width)
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
        # rotation and attention want the elements of a head side by side
        heads_BTHK = self.qkv(x_BTD).contiguous().unflatten(-1, (sum(self.heads), self.head_width))
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
        if isinstance(mask, CacheMask) and mask.parts:
            out_BTNK = _attend_in_parts(q_BTNK, k_BSGK, v_BSGK, mask, backend)
        else:
            out_BTNK = attend(q_BTNK, k_BSGK, v_BSGK, mask=mask, backend=backend)
        return self.out(out_BTNK.flatten(2))


def _attend_in_parts(q_BTNK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, mask: CacheMask, backend: Backend) -> Tensor:
    """Attention of rows to their first slots, see `CacheMask.parts`."""
    outputs = []
    for rows, part in mask.parts:
        num_slots = part.visible_BTS.shape[-1]
        k_RSGK, v_RSGK = k_BSGK[rows, :num_slots], v_BSGK[rows, :num_slots]
        outputs.append(attend(q_BTNK[rows], k_RSGK, v_RSGK, mask=part, backend=backend))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


class FeedForward(nn.Module):
    """Two matrices around ReLU or GELU, or SwiGLU (arXiv:2002.05202), gate and value in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        inner = 2 * config.ffn_width if config.activation == "swiglu" else config.ffn_width
        self.up = Linear(config.width, inner)
        self.out = Linear(config.ffn_width, config.width)

    def forward(self, x_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        inner = self.up(x_BTD)
        if self.activation == "swiglu":
            gate_BTF, value_BTF = inner.chunk(2, dim=-1)
            return self.out(F.silu(gate_BTF) * value_BTF)
        return self.out(F.relu(inner) if self.activation == "relu" else F.gelu(inner))
