"""Where a parameter lies in the transformers of a model: in which layer, before the first one, or behind the last.

A GPT has one transformer, a tokenizer two: the one from an image to its codes, behind the CNN encoder, and the one from
codes to an image, before the CNN decoder.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Transformer(NamedTuple):
    """How the names of its parameters begin: in `layers` a layer's number follows; `before` feeds the first layer."""

    layers: str
    before: tuple[str, ...]


TRANSFORMERS = (
    Transformer("layers.", ("cls_embedding.", "tok_embeddings.", "positional_embedding", "adaLN.")),
    Transformer("encoder.transformer.", (
        "cnn_encoder.", "encoder.ln_pre.", "encoder.encoder_embed.", "encoder.global_proj.", "encoder.query_1d",
        "encoder.positional_embedding", "encoder.latent_token_positional_embedding")),
    Transformer("decoder.transformer.", (
        "post_quant_conv.", "decoder.ln_pre.", "decoder.decoder_embed.", "decoder.q_2d",
        "decoder.positional_embedding", "decoder.latent_token_positional_embedding")),
)


def in_a_layer(name: str) -> bool:
    """Whether a parameter belongs to a transformer's layer."""
    return any(name.startswith(transformer.layers) for transformer in TRANSFORMERS)


def layers_to_last(names: Iterable[str]) -> dict[str, int]:
    """How many layers of its transformer follow each parameter of a model: 0 for the last layer and what is behind it,
    as many as there are for what feeds the first."""
    found = dict.fromkeys(names, 0)
    for transformer in TRANSFORMERS:
        layer = {name: int(name.removeprefix(transformer.layers).partition(".")[0]) for name in found
                 if name.startswith(transformer.layers)}
        depth = 1 + max(layer.values(), default=-1)
        found |= {name: depth - 1 - index for name, index in layer.items()}
        found |= {name: depth for name in found if name.startswith(transformer.before)}
    return found
