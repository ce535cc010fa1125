"""The vector quantizer: each latent becomes its nearest code."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.config.model import QuantizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.kernels.ops import assignment_statistics, code_histogram, entropy_penalty, nearest_code
from gigatok_ds.models.initialisation import Fill, uniform
from gigatok_ds.parallel.layers import PLAIN, Layers

# How many of the latest codes the usage statistic looks back on (the original's ring buffer).
USAGE_WINDOW = 65536


class QuantizerLosses(NamedTuple):
    """Unweighted scalar losses; means run over all elements of the (normalised) latents."""

    codebook: Tensor
    commitment: Tensor
    entropy: Tensor


class QuantizerOutput(NamedTuple):
    """quantized (B, D, H, W); codes (B, H * W) int64, row-major."""

    quantized: Tensor
    codes: Tensor
    losses: QuantizerLosses


class VectorQuantizer(nn.Module):
    """Codebook (K, D); with `l2_normalized`, latents and codes are compared on the unit sphere."""

    codebook_used: Tensor

    def __init__(self, config: QuantizerConfig, layers: Layers = PLAIN):
        super().__init__()
        self.config = config
        self.mean_over_data = layers.mean_over_data
        self.embedding = nn.Parameter(torch.empty(config.codebook_size, config.codebook_dim))
        # The latents as the entropy term sees them: a place to watch that term's gradient at.
        self.entropy_latent = nn.Identity()
        # Integers, so that casting the model to bfloat16 cannot round a code index.
        self.register_buffer("codebook_used", torch.zeros(USAGE_WINDOW, dtype=torch.int32))

    def init_fn(self, name: str) -> Fill:
        """Codes uniform in +-1/K, then on the unit sphere if they are compared there."""

        def fill(codes: Tensor, generator: torch.Generator) -> None:
            uniform(1.0 / self.config.codebook_size)(codes, generator)
            codes.copy_(self._normalized(codes))

        return fill

    def codebook(self) -> Tensor:
        """(K, D) float32 codes as they are compared and decoded: normalised at every use, stored as they are."""
        return self._normalized(self.embedding.float())

    def _normalized(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=-1) if self.config.l2_normalized else x

    def codes(self, latent: Tensor) -> Tensor:
        """Codes (B, H * W) of latents (B, D, H, W) without waiting for the device: -1 for a latent that is not finite.
        """
        z = self._normalized(latent.permute(0, 2, 3, 1).flatten(0, 2).float())
        return nearest_code(z, self.codebook(), strict=False).view(len(latent), -1)

    def forward(self, latent: Tensor, *, entropy: Literal["global", "data_rank"] | None = None) -> QuantizerOutput:
        """Quantize latents (B, D, H, W). `entropy` also computes the entropy loss, which is zero otherwise, with the
        mean assignment of all data-parallel ranks or of this one.

        Raises InputError in evaluation when a latent or a code is not finite, naming it. In training, where nobody may
        wait for the device, such a latent has the code -1, and the losses are NaN for the training loop to see.
        """
        batch, _, height, width = latent.shape
        z = self._normalized(latent.permute(0, 2, 3, 1).flatten(0, 2).float())
        codebook = self.codebook()
        strict = not self.training
        if entropy:
            assignment = assignment_statistics(self.entropy_latent(z), codebook, strict=strict)
            average = self.mean_over_data if entropy == "global" else None
            codes, entropy_loss = assignment.codes, entropy_penalty(assignment, average)
        else:
            codes, entropy_loss = nearest_code(z, codebook, strict=strict), z.new_zeros(())
        code_vectors = codebook[codes.clamp_min(0)]
        # A latent without a code is NaN itself. A damaged code is nobody's nearest, so that only this tells of it.
        damage = codebook.new_zeros(()).masked_fill(~codebook.detach().isfinite().all(), torch.nan)
        losses = QuantizerLosses(
            codebook=F.mse_loss(code_vectors, z.detach()) + damage,
            commitment=F.mse_loss(z, code_vectors.detach()),
            entropy=entropy_loss,
        )
        quantized = GRADIENTS[self.config.gradient](z, code_vectors.detach())
        quantized = quantized.view(batch, height, width, -1).permute(0, 3, 1, 2).to(latent.dtype)
        return QuantizerOutput(quantized, codes.view(batch, height * width), losses)

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes (B, T) to their exact code vectors as latents (B, D, 1, T) in the weights' dtype."""
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.config.codebook_size):
            raise InputError(
                f"codes must be in [0, {self.config.codebook_size}); got {int(codes.min())} to {int(codes.max())}"
            )
        vectors = self._normalized(self.embedding[codes.long()].float())
        return vectors.permute(0, 2, 1).unsqueeze(2).to(self.embedding.dtype)

    @torch.no_grad()
    def record_usage(self, codes: Tensor) -> Tensor:
        """Push codes (any shape) into the window and return the fraction of the codebook it holds, a scalar.

        The window starts as zeros, so code 0 counts as used until 65,536 codes have passed, as in the original.
        """
        latest = codes.flatten()[-USAGE_WINDOW:].to(self.codebook_used.dtype)
        kept = self.codebook_used[latest.numel():].clone()
        self.codebook_used.copy_(torch.cat([kept, latest]))
        return (code_histogram(self.codebook_used, self.config.codebook_size) > 0).float().mean()


def straight_through(z: Tensor, code_vectors: Tensor) -> Tensor:
    """The code vectors (N, D), with the gradient of the identity for z."""
    return z + (code_vectors - z).detach()


def rotate(z: Tensor, code_vectors: Tensor) -> Tensor:
    """The rotation trick (Fifty et al. 2024, arXiv:2410.06424): z rotated and rescaled onto its code vector.

    The rotation is constant in the backward pass, so the gradient turns with it. In value the result differs from
    the code vector by the 1e-6 guards (about 4e-6 relative). z and code_vectors are (N, D).
    """
    z = z / z.norm(dim=1, keepdim=True)
    with torch.no_grad():
        z_norm, code_norm = z.norm(dim=1, keepdim=True), code_vectors.norm(dim=1, keepdim=True)
        u, q = z / (z_norm + 1e-6), code_vectors / (code_norm + 1e-6)
        w = u + q
        w = w / w.norm(dim=1, keepdim=True)
        scale = code_norm / (z_norm + 1e-6)
    rotated = z - 2 * (z * w).sum(1, keepdim=True) * w + 2 * (z * u).sum(1, keepdim=True) * q
    return rotated * scale


# By QuantizerConfig.gradient: code vectors (N, D), with a gradient for the latents (N, D).
GRADIENTS = {"rotation": rotate, "straight_through": straight_through}
