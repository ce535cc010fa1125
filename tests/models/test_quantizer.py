"""The quantizer against the original's values and gradients, and its own promises."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_models import arrays
from golden_weights import tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gigatok_ds import InputError
from gigatok_ds.config.losses import QuantizerLossConfig, TokenizerLossConfig
from gigatok_ds.config.model import QuantizerConfig
from gigatok_ds.kernels.ops import assignment_entropy, assignment_statistics, entropy_penalty, nearest_code
from gigatok_ds.models import quantizer as quantizer_module
from gigatok_ds.models.quantizer import USAGE_WINDOW, VectorQuantizer
from gigatok_ds.parallel.layers import PlainLayers

BETA, ENTROPY_RATIO = 0.25, 0.005


def golden_quantizer(gradient):
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=1024, codebook_dim=8, gradient=gradient))
    with torch.no_grad():
        quantizer.embedding.copy_(torch.from_numpy(tensor("golden/quantizer/codebook", (1024, 8))))
    latent = torch.from_numpy(tensor("golden/quantizer/latent", (4, 8, 1, 64))).requires_grad_()
    return quantizer, latent


@pytest.mark.parametrize("gradient", ["straight_through", "rotation"])
def test_values_and_gradients_match_the_original(gradient):
    golden = {key.removeprefix(gradient + "_"): value for key, value in arrays("quantizer").items()
              if key.startswith(gradient)}
    quantizer, latent = golden_quantizer(gradient)
    output = quantizer(latent, entropy="global")

    def close(ours, key):
        np.testing.assert_allclose(ours.detach().numpy(), golden[key], rtol=0, atol=1e-5)

    close(output.quantized, "quantized")
    assert (output.codes.flatten().numpy() == golden["indices"]).all()
    usage = quantizer.record_usage(output.codes)
    losses = [output.losses.codebook, BETA * output.losses.commitment, ENTROPY_RATIO * output.losses.entropy]
    np.testing.assert_allclose([loss.item() for loss in losses] + [usage.item()], golden["losses"], atol=1e-5)
    upstream = torch.from_numpy(tensor("golden/quantizer/upstream_gradient", (4, 8, 1, 64)))
    through, = torch.autograd.grad((output.quantized * upstream).sum(), latent, retain_graph=True)
    close(through, "grad_latent_through_quantized")
    to_latent, to_codebook = torch.autograd.grad(sum(losses), [latent, quantizer.embedding])
    close(to_latent, "grad_latent_losses")
    close(to_codebook, "grad_codebook_losses")


def test_assignment_entropy_agrees_with_its_definition_in_float64():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(64, 3, dtype=torch.float64, generator=generator)
    codebook = torch.randn(20, 3, dtype=torch.float64, generator=generator)
    logits = -torch.cdist(latents, codebook).square() / 0.01
    p = logits.softmax(1)
    q = p.mean(0)
    expected = -(p * logits.log_softmax(1)).sum(1).mean() + (q * (q + 1e-5).log()).sum()
    assert assignment_entropy(latents, codebook).item() == pytest.approx(expected.item(), rel=1e-9)


def test_nearest_code_agrees_with_float64_and_breaks_ties_low():
    generator = torch.Generator().manual_seed(0)
    latents, codebook = torch.randn(3000, 8, generator=generator), torch.randn(500, 8, generator=generator)
    exact = torch.cdist(latents.double(), codebook.double())
    assert torch.equal(nearest_code(latents, codebook), exact.argmin(1))
    doubled = torch.cat([codebook, codebook])
    assert nearest_code(latents, doubled).max() < 500


def test_one_latent_only():
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=16, codebook_dim=4))
    assert quantizer(torch.randn(1, 4, 1, 1)).codes.shape == (1, 1)


def test_usage_looks_back_one_window():
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=8, codebook_dim=4))
    assert quantizer.record_usage(torch.tensor([3, 5])).item() == pytest.approx(3 / 8)  # the zeros count as code 0
    assert quantizer.record_usage(torch.full((USAGE_WINDOW + 10,), 7)).item() == pytest.approx(1 / 8)


def test_bfloat16_model_keeps_code_indices_exact():
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=16384, codebook_dim=4)).bfloat16()
    quantizer.record_usage(torch.tensor([16383, 16381]))
    assert sorted(quantizer.codebook_used.unique().tolist()) == [0, 16381, 16383]


def test_codes_outside_the_codebook_are_refused():
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=16, codebook_dim=4))
    with pytest.raises(InputError, match=r"\[0, 16\); got 0 to 16"):
        quantizer.lookup(torch.tensor([[0, 16]]))


def test_the_mean_assignment_is_of_all_data_ranks_or_of_one():
    class TwoRanks:
        """Stands for another rank that uses the first code only."""
        def __call__(self, q):
            return (q + torch.eye(30)[0]) / 2

    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=30, codebook_dim=4), PlainLayers(TwoRanks()))
    torch.nn.init.normal_(quantizer.embedding, generator=torch.Generator().manual_seed(0))
    latent = torch.randn(2, 4, 1, 6, generator=torch.Generator().manual_seed(1))
    statistics = assignment_statistics(F.normalize(latent.permute(0, 2, 3, 1).flatten(0, 2), dim=1),
                                       quantizer.codebook())
    by_scope = {scope: quantizer(latent, entropy=scope).losses.entropy.item() for scope in ("global", "data_rank")}
    assert by_scope["data_rank"] == pytest.approx(entropy_penalty(statistics).item(), abs=1e-6)
    assert by_scope["global"] == pytest.approx(entropy_penalty(statistics, TwoRanks()).item(), abs=1e-6)
    assert abs(by_scope["global"] - by_scope["data_rank"]) > 0.01
    objective = TokenizerLossConfig(quantizer=QuantizerLossConfig(entropy=0.1, entropy_end_step=3,
                                                                  statistics="data_rank"),
                                    perceptual=None, adversarial=None, auxiliary=None, semantic=None)
    assert [objective.wants_entropy(step) for step in (1, 2, 3)] == ["data_rank", "data_rank", None]


class Counted(TorchDispatchMode):
    """Operations that compute something, and the bytes that they read and write."""

    def __init__(self):
        super().__init__()
        self.operations = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.overloadpacket not in (torch.ops.aten.detach, torch.ops.aten._unsafe_view):
            self.operations += 1
            self.bytes += sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves((args, kwargs, result))
                              if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize("gradient, most, operations", [("straight_through", 4461, 62), ("rotation", 6991, 107)])
def test_all_but_the_search_moves_few_bytes(monkeypatch, gradient, most, operations):
    """Counted on tensors without storage for 8,192 latents: why docs/kernels.md has no kernel for it."""
    monkeypatch.setattr(quantizer_module, "nearest_code", lambda z, codebook,
                        strict: z.new_empty(len(z), dtype=torch.long))
    with torch.device("meta"):
        quantizer = VectorQuantizer(QuantizerConfig(codebook_size=16384, codebook_dim=8, gradient=gradient)).train()
        latents = torch.empty(32, 8, 1, 256, requires_grad=True)
    with Counted() as counted:
        output = quantizer(latents)
        total = output.losses.codebook + output.losses.commitment + output.quantized.sum()
        torch.autograd.grad(total, [latents, quantizer.embedding])
    assert counted.bytes <= most * 8192 and counted.operations <= operations
