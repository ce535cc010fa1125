"""Tiny configurations that exercise every part of the real ones in milliseconds."""

import torch

from gigatok_ds.config.model import (
    CNNConfig,
    GPTConfig,
    QuantizerConfig,
    SemanticHeadConfig,
    TokenizerConfig,
    TransformerSize,
)
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer

SMALL = TransformerSize(width=32, layers=2, heads=2)


def small_tokenizer_config(**changes):
    settings = dict(
        layout="1d",
        image_size=16,
        encoder=SMALL,
        decoder=SMALL,
        latent_tokens=8,
        z_channels=32,
        cnn=CNNConfig(base_channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), residual_blocks=1),
        quantizer=QuantizerConfig(codebook_size=64, codebook_dim=4),
        semantic_head=SemanticHeadConfig(depth=1, teacher_width=24),
    )
    return TokenizerConfig(**settings | changes)


def small_gpt_config(**changes):
    settings = dict(size=SMALL, vocab_size=64, sequence_length=8, num_classes=5)
    return GPTConfig(**settings | changes)


def small_tokenizer(**changes):
    return initialise_(Tokenizer(small_tokenizer_config(**changes)), seed=0).eval()


def small_gpt(**changes):
    """A GPT whose head is not zero, so that it has opinions."""
    gpt = initialise_(GPT(small_gpt_config(**changes)), seed=0).eval()
    torch.nn.init.normal_(gpt.output.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return gpt
