"""Initial weights: the original's distributions, and independence of everything but seed and name."""

import pytest
import torch
from small_models import small_gpt_config, small_tokenizer_config

from gigatok_ds.config.model import TransformerSize
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initial_fills, initialise_
from gigatok_ds.models.tokenizer import Tokenizer

WIDE = TransformerSize(width=128, layers=1, heads=2)


@pytest.fixture(scope="module")
def tokenizer():
    return initialise_(Tokenizer(small_tokenizer_config(encoder=WIDE, decoder=WIDE)), seed=3)


def test_every_parameter_has_a_rule():
    for network in (Tokenizer(small_tokenizer_config()), Tokenizer(small_tokenizer_config(latent_query="learned")),
                    GPT(small_gpt_config(qk_norm=True))):
        assert len(list(initial_fills(network))) == len(list(network.parameters()))


def test_distributions_are_the_originals(tokenizer):
    parameters = dict(tokenizer.named_parameters())
    expected_std = {
        "encoder.transformer.0.linear1.weight": 0.02,
        "cnn_decoder.mid.0.conv1.weight": 0.02,
        "decoder.distill_mlp.2.weight": 0.02,
        "encoder.transformer.0.self_attn.out_proj.weight": 0.02,
        "encoder.transformer.0.self_attn.k_proj.weight": (6 / (4 * 128)) ** 0.5 / 3**0.5,
        "decoder.positional_embedding": 128**-0.5,
        "quant_conv.weight": 32**-0.5 / 3**0.5,
    }
    for name, std in expected_std.items():
        assert parameters[name].std().item() == pytest.approx(std, rel=0.1), name
    assert parameters["quant_conv.bias"].abs().max() > 0
    assert parameters["encoder.transformer.0.linear1.bias"].abs().max() == 0
    assert (parameters["encoder.ln_pre.weight"] == 1).all()
    assert torch.allclose(parameters["quantizer.embedding"].norm(dim=1), torch.ones(64))


def test_gpt_distributions():
    gpt = initialise_(GPT(small_gpt_config(size=WIDE)), seed=0)
    assert gpt.layers[0].attention.wqkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert gpt.positional_embedding.std().item() == pytest.approx(128**-0.5, rel=0.1)
    assert gpt.output.weight.abs().max() == 0 and (gpt.norm.weight == 1).all()


def test_only_seed_and_name_matter(tokenizer):
    torch.manual_seed(99)
    again = initialise_(Tokenizer(small_tokenizer_config(encoder=WIDE, decoder=WIDE)), seed=3)
    other = initialise_(Tokenizer(small_tokenizer_config(encoder=WIDE, decoder=WIDE)), seed=4)
    for (name, ours), theirs in zip(tokenizer.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    # A tokenizer without the semantic head starts from the same values everywhere else.
    without = dict(initialise_(Tokenizer(small_tokenizer_config(encoder=WIDE, decoder=WIDE, semantic_head=None)),
                               seed=3).named_parameters())
    assert all(torch.equal(value, dict(tokenizer.named_parameters())[name]) for name, value in without.items())
    assert not torch.equal(other.quant_conv.weight, tokenizer.quant_conv.weight)
