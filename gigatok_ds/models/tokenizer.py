"""The GigaTok tokenizer: image to codes and back (Xiong et al. 2025, arXiv:2504.08736)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from gigatok_ds.config.model import TokenizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.cnn import CNNDecoder, CNNEncoder
from gigatok_ds.models.initialisation import Fill, truncated_normal, uniform
from gigatok_ds.models.latent_decoder import GridDecoder, LatentDecoder
from gigatok_ds.models.latent_encoder import GridEncoder, LatentEncoder
from gigatok_ds.models.positions import resizable, resized_grid
from gigatok_ds.models.quantizer import QuantizerLosses, QuantizerOutput, VectorQuantizer
from gigatok_ds.parallel.layers import PLAIN, Layers


class TokenizerOutput(NamedTuple):
    """What a training step needs of one forward pass.

    reconstruction and direct_reconstruction (B, 3, S, S); codes (B, T); cnn_feature and decoded_feature
    (B, z, G, G), before the transformer encoder and after the transformer decoder; semantic_feature
    (B, G * G, teacher width). Parts that were not asked for are None. Where tensor ranks share a batch, images are
    this rank's and everything else is of the whole batch B.
    """

    reconstruction: Tensor
    codes: Tensor
    quantizer_losses: QuantizerLosses
    cnn_feature: Tensor
    decoded_feature: Tensor
    semantic_feature: Tensor | None
    direct_reconstruction: Tensor | None


_FAR = 10.0  # no image in [-1, 1] comes near, and hardly one in [0, 255] stays below


def check_range(images: Tensor) -> None:
    """Raise InputError for what is not images in [-1, 1]; a little beyond, as resampling makes it, is let pass."""
    scaling = "expected are floating-point values in [-1, 1], which 8-bit images are after images / 127.5 - 1"
    if not images.is_floating_point():
        raise InputError(f"images are of type {str(images.dtype).removeprefix('torch.')}; {scaling}")
    if images.device.type == "cpu" and images.numel() and type(images) is Tensor:
        least, greatest = (float(value) for value in images.aminmax())
        if not -_FAR < least <= greatest < _FAR:
            raise InputError(f"images hold values from {least:.4g} to {greatest:.4g}; {scaling}")


class Tokenizer(nn.Module):
    """CNN encoder, transformer encoder, quantizer, transformer decoder, CNN decoder.

    Images are (B, 3, S, S) in [-1, 1]; codes are (B, T) int64.
    """

    def __init__(self, config: TokenizerConfig, layers: Layers = PLAIN):
        super().__init__()
        self.config = config
        self.image_shape = config.image_size, config.image_size  # height and width
        encoder, decoder = (LatentEncoder, LatentDecoder) if config.layout == "1d" else (GridEncoder, GridDecoder)
        dim = config.quantizer.codebook_dim
        self.images = layers.images
        self.cnn_encoder = layers.per_image(CNNEncoder(config.cnn, config.z_channels, config.dropout))
        self.encoder = encoder(config, layers)
        self.decoder = decoder(config, layers)
        self.cnn_decoder = layers.per_image(CNNDecoder(config.cnn, config.z_channels, config.dropout))
        self.quant_conv = nn.Conv2d(config.z_channels, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, config.z_channels, 1)
        self.quantizer = VectorQuantizer(config.quantizer, layers)

    @property
    def latent_tokens(self) -> int:
        """How many codes an image has: of images of another shape not always the config's."""
        rows, columns = self.decoder.grid
        return self.config.latent_tokens if self.config.layout == "1d" else rows * columns

    def init_fn(self, name: str) -> Fill | None:
        """N(0, 0.02) for weights, as in the original, whose quantizer convolutions keep torch's own default."""
        room, _, rest = name.partition(".")
        if room in ("quant_conv", "post_quant_conv"):
            return uniform(getattr(self, room).in_channels ** -0.5)
        is_weight = rest.endswith("weight")
        owner = self.get_submodule(name.rpartition(".")[0])
        return truncated_normal(0.02) if is_weight and "Norm" not in type(owner).__name__ else None

    def set_image_shape(self, height: int, width: int) -> None:
        """Take and return images (B, 3, height, width) from now on. The CNN takes any; the positions of its grids are
        interpolated bicubically, latent tokens of the 1-D layout stay as many as they are.

        Raises InputError unless both sides are multiples of a cell.
        """
        cell, before = self.config.image_size // self.config.grid, self.decoder.grid
        if min(height, width) < cell or height % cell or width % cell:
            near = " x ".join(str(max(round(side / cell), 1) * cell) for side in (height, width))
            raise InputError(f"images of {height} x {width} cannot be cut into this tokenizer's cells of {cell} x "
                             f"{cell} pixels; the nearest size is {near}")
        self.decoder.grid, self.image_shape = (height // cell, width // cell), (height, width)
        for name, how in resizable(self.config).items():
            place, _, parameter = name.rpartition(".")
            owner = self.get_submodule(place)
            if how == "grid" and (table := getattr(owner, parameter, None)) is not None:
                resized = resized_grid(table.detach().float().flatten(1), before, self.decoder.grid).to(table.dtype)
                setattr(owner, parameter, nn.Parameter(resized.reshape(-1, *table.shape[1:]), table.requires_grad))

    def accept(self, images: Tensor) -> Tensor:
        """The images in the weights' dtype and on their device; InputError when they have another shape."""
        height, width = self.image_shape
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise InputError(
                f"images have shape {tuple(images.shape)}; this tokenizer takes (batch, 3, {height}, {width})"
            )
        return images.to(self.quant_conv.weight.device, self.quant_conv.weight.dtype)

    def forward(self, images: Tensor, *, entropy: Literal["global", "data_rank"] | None = None, semantic: bool = False,
                direct: bool = False) -> TokenizerOutput:
        """One training pass over this rank's images.

        `direct` also decodes the CNN's own features, bypassing transformers and quantizer.
        """
        own_feature = self.cnn_encoder(self.accept(images))
        cnn_feature = self.images.gather(own_feature)
        quantized = self.quantizer(self.quant_conv(self.encoder(cnn_feature)), entropy=entropy)
        decoded_feature, semantic_feature = self.decoder(self.post_quant_conv(quantized.quantized), semantic=semantic)
        return TokenizerOutput(
            reconstruction=self.cnn_decoder(self.images.scatter(decoded_feature)),
            codes=quantized.codes,
            quantizer_losses=quantized.losses,
            cnn_feature=cnn_feature,
            decoded_feature=decoded_feature,
            semantic_feature=semantic_feature,
            direct_reconstruction=self.cnn_decoder(own_feature) if direct else None,
        )

    def latent(self, images: Tensor) -> Tensor:
        """Latents before the quantizer: (B, D, 1, T) in the 1-D layout, (B, D, G, G) in the 2-D layout."""
        return self.quant_conv(self.encoder(self.images.gather(self.cnn_encoder(self.accept(images)))))

    def quantize(self, images: Tensor) -> QuantizerOutput:
        return self.quantizer(self.latent(images))

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] to codes (B, T) int64.

        Raises InputError for images of another shape or of whole numbers and, of images in host memory, when values are
        not finite or far outside the range; of those on a device nothing is read, since that would wait for it.
        """
        check_range(images)
        if len(images) == 0:
            return torch.empty(0, self.latent_tokens, dtype=torch.long, device=self.accept(images).device)
        return self.quantize(images).codes

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, T) to images (B, 3, S, S), nominally in [-1, 1] but not clamped.

        Raises InputError when a code lies outside the codebook or T is not the number of latent tokens.
        """
        if codes.ndim != 2 or codes.shape[1] != self.latent_tokens:
            raise InputError(
                f"codes have shape {tuple(codes.shape)}; this tokenizer takes (batch, {self.latent_tokens})"
            )
        latent = self.quantizer.lookup(codes.to(self.quant_conv.weight.device))
        return self.cnn_decoder(self.images.scatter(self.decoder(self.post_quant_conv(latent))[0]))
