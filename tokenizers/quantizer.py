"""Vector quantisation with a straight-through gradient (van den Oord et al. 2017, section 3.2).

With unit-length latents and codes the nearest code is the one of largest cosine (Yu et al. 2022,
"Vector-quantized Image Modeling with Improved VQGAN", section 3.2). The codebook is a buffer: moving averages
move it, outside of the gradient (`cm3.training.codebook`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

CHUNK_ENTRIES = 1 << 25
"""Most distances held at once: 128 MB in fp32."""


class Quantized(NamedTuple):
    """What quantisation returns; every tensor is fp32 except the indices."""

    vectors_BEHW: Tensor
    """Chosen codes; the gradient goes straight through to the latents."""
    codes_BP: Tensor
    """Codebook indices in raster order, int64."""
    latents_NE: Tensor
    """The (normalised) vectors that were quantised, in the order of `codes_BP`; detached."""
    commitment_loss: Tensor
    """Mean squared difference of the latents and their codes, over all entries."""


class VectorQuantizer(nn.Module):
    """A codebook and the nearest-code search in it."""

    codebook_QE: Tensor

    def __init__(self, num_codes: int, code_width: int, normalize: bool) -> None:
        super().__init__()
        self.normalize = normalize
        codebook_QE = torch.randn(num_codes, code_width)
        self.register_buffer("codebook_QE", self.project(codebook_QE))

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors (last axis E) as they are compared: unit length if codes are normalised."""
        return F.normalize(vectors.float(), dim=-1) if self.normalize else vectors.float()

    @torch.no_grad()
    def nearest(self, latents_NE: Float[Tensor, "N E"]) -> Int[Tensor, " N"]:
        """Index of the nearest code of each vector, in chunks of bounded memory."""
        with torch.autocast(latents_NE.device.type, enabled=False):
            bias_Q = -0.5 * self.codebook_QE.square().sum(1)
            rows = max(1, CHUNK_ENTRIES // len(self.codebook_QE))
            parts = [torch.addmm(bias_Q, part_NE, self.codebook_QE.T).argmax(1) for part_NE in latents_NE.split(rows)]
        return torch.cat(parts)

    def forward(self, latents_BEHW: Float[Tensor, "B E H W"]) -> Quantized:
        """Replace every latent by its nearest code."""
        batch, width, height, columns = latents_BEHW.shape
        latents_NE = self.project(latents_BEHW.permute(0, 2, 3, 1).reshape(-1, width))
        codes_N = self.nearest(latents_NE.detach())
        vectors_NE = self.codebook_QE[codes_N]
        commitment_loss = (latents_NE - vectors_NE).square().mean()
        straight_NE = latents_NE + (vectors_NE - latents_NE).detach()
        vectors_BEHW = straight_NE.view(batch, height, columns, width).permute(0, 3, 1, 2)
        return Quantized(vectors_BEHW, codes_N.view(batch, -1), latents_NE.detach(), commitment_loss)

    def lookup(self, codes_BP: Int[Tensor, "B P"], grid: tuple[int, int]) -> Float[Tensor, "B E H W"]:
        """The code vectors of a raster-order grid of indices."""
        return self.codebook_QE[codes_BP].unflatten(1, grid).permute(0, 3, 1, 2)
