"""One feature vector an image of a frozen GPT or tokenizer."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.dropout import dropout_at, name_dropouts

Place = Literal["encoder", "cnn", "decoder"]


class GPTFeatures:
    """The mean over positions of the residual stream after block `depth`, counted from 1: by default the middle one.

    The GPT reads an image's codes but the last after the class "none". While a probe is trained its dropout is active,
    as in the original, unless told not to.
    """

    def __init__(self, tokenizer: Tokenizer, gpt: GPT, *, depth: int | None = None, dropout: bool = True):
        layers = len(gpt.layers)
        self.tokenizer, self.gpt, self.dropout = tokenizer, gpt, dropout
        self.depth = layers // 2 if depth is None else depth
        if not 1 <= self.depth <= layers:
            raise InputError(f"depth is {self.depth}; this GPT has blocks 1 to {layers}")
        self.width = gpt.config.transformer.width
        name_dropouts(gpt)

    @torch.no_grad()
    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """Images (B, 3, S, S) in [-1, 1] to float32 (B, width).

        positions (B,) address the dropout of a training step; None is evaluation.
        """
        codes = self.tokenizer.encode(images)
        classes = torch.full((len(codes),), self.gpt.unconditional_class, device=codes.device)
        self.gpt.train(self.dropout and positions is not None)
        try:
            with dropout_at(0, torch.zeros(len(codes), dtype=torch.long) if positions is None else positions.cpu()):
                return self.gpt.hidden_states(codes[:, :-1], classes, depth=self.depth).mean(dim=0).float()
        finally:
            self.gpt.eval()

    def describe(self) -> dict:
        return {"features": "gpt", "block": self.depth, "dropout": self.dropout}


class TokenizerFeatures:
    """The mean over tokens of a tokenizer's own features, without dropout.

    place: "encoder" is the transformer encoder's output after its last norm; "cnn" what its last convolution makes of
    that, of the width of the CNN's features; "decoder" the decoder's tokens after the layer that the semantic
    regularisation looks at, from quantized codes.
    """

    def __init__(self, tokenizer: Tokenizer, place: Place = "encoder"):
        self.tokenizer, self.place = tokenizer, place
        self.module, self.width = self._module()

    def _module(self) -> tuple[nn.Module, int]:
        tokenizer, config = self.tokenizer, self.tokenizer.config
        if self.place == "encoder":
            return tokenizer.encoder.ln_post, config.encoder_size.width
        if self.place == "cnn":
            return tokenizer.encoder.conv_out, config.z_channels
        if self.place != "decoder":
            raise InputError(f"features are {self.place!r}; choose encoder, cnn or decoder")
        if config.semantic_head is None:
            raise InputError(
                "this tokenizer has no semantic head, so nothing says which decoder layer to probe; choose "
                "encoder or cnn"
            )
        return tokenizer.decoder.transformer[config.semantic_head.depth - 1], config.decoder_size.width

    @torch.no_grad()
    def __call__(self, images: Tensor, positions: Tensor | None = None) -> Tensor:
        """As `GPTFeatures`; positions are not needed."""
        found = []
        hook = self.module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
        try:
            if self.place == "decoder":
                self.tokenizer.decode(self.tokenizer.encode(images))
            else:
                self.tokenizer.latent(images)
        finally:
            hook.remove()
        tokens = found[0].flatten(2).permute(2, 0, 1) if self.place == "cnn" else found[0]
        return tokens.mean(dim=0).float()

    def describe(self) -> dict:
        return {"features": f"tokenizer {self.place}"}


Features = GPTFeatures | TokenizerFeatures
