"""The Triton kernels on a GPU: against float64, or bit for bit against what is written out for CPUs."""

import pytest
import torch
from group_norm_cases import CASES, EPS, ROUNDING

from gigatok_ds.kernels import group_norm_ops
from gigatok_ds.kernels.addressed_dropout import addressed_dropout
from gigatok_ds.kernels.dropout_mask import dropped, rule_of
from gigatok_ds.parallel.cross_entropy import become_gradient_, totals_and_picked

pytestmark = pytest.mark.gpu
NORMS = CASES["quick"] | CASES["slow"]


def normalised(case):
    """y and the gradients by the kernels, on the GPU."""
    *given, upstream = (tensor.cuda() for tensor in case.inputs())
    given = [tensor.requires_grad_() for tensor in given]
    assert group_norm_ops.suits(given[0])
    y = group_norm_ops.group_norm(*given, case.groups, EPS, silu=case.silu)
    return [y.detach(), *torch.autograd.grad(y, given, upstream)]


@pytest.mark.parametrize("name", NORMS)
def test_group_norm_agrees_with_float64_and_repeats_to_the_bit(name):
    case = NORMS[name]
    far = abs(case.mean) / case.spread * 2**-24
    for ours, repeated, expected in zip(normalised(case), normalised(case), case.expected(), strict=True):
        assert ours.dtype == case.dtype and torch.equal(ours, repeated)
        tolerance = ROUNDING[case.dtype] + 16 * far
        assert (ours.cpu().double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tokens, batch, width", [(1, 1, 1), (5, 4, 24), (257, 3, 768), (16, 7, 1537), (3, 2, 5000)])
def test_dropout_keeps_what_it_keeps_on_a_cpu(tokens, batch, width, full, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, batch, width, generator=generator).to(dtype)
    samples = torch.tensor([3, 2**33 + 1, 70, 2**62 - 5, 0, 1, 2**31])[:batch]
    rule = torch.tensor(rule_of(2**31 + 9, 0.3), dtype=torch.int32)
    ours = x.cuda().requires_grad_()
    result = addressed_dropout(ours, samples.cuda(), rule.cuda(), 9, 11, full)
    assert torch.equal(result.cpu(), dropped(x, samples, rule, 9, 11, full))
    gradient, = torch.autograd.grad(result, ours, x.cuda())
    assert torch.equal(gradient, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (3, 100), (65, 4096), (7, 16384), (5, 5000)])
def test_the_heads_loss_agrees_with_float64(rows, vocabulary, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(rows, vocabulary, generator=generator)).to(dtype)
    targets = torch.randint(-1, vocabulary + 1, (rows,), generator=generator)  # -1 and V are other ranks'
    upstream = torch.randn(rows, generator=generator)
    owned, columns = (targets >= 0) & (targets < vocabulary), targets.clamp(0, vocabulary - 1)
    wide = logits.double()
    totals, picked = totals_and_picked(logits.cuda(), targets.cuda())
    torch.testing.assert_close(totals.cpu().double(), wide.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert torch.equal(picked.cpu(), wide.gather(1, columns[:, None])[:, 0].where(owned, 0.0).float())
    become = logits.cuda()
    become_gradient_(become, targets.cuda(), totals, upstream.cuda())
    expected = wide.softmax(1)
    expected[torch.arange(rows), columns] -= owned.double()
    expected *= upstream.double()[:, None]
    error = (become.cpu().double() - expected).abs().max()
    assert error <= (2e-6 if dtype == torch.float32 else 5e-3) * max(expected.abs().max().item(), 1e-3)
