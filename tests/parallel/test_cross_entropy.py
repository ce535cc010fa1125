"""The vocabulary head's cross-entropy in chunks: against plain torch in float64, over ranks, and what it holds."""

import weakref

import pytest
import torch
import torch.nn.functional as F
from benchmark_scripts import loaded
from operation_costs import Costs
from rank_runs import run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from gigatok_ds.parallel import cross_entropy
from gigatok_ds.parallel.topology import start_process_group

TOKENS, BATCH, WIDTH, VOCABULARY = 6, 5, 16, 96


def problem(dtype=torch.float32, scale=3.0):
    """Input, weight, targets and a gradient that differs from loss to loss, some of it zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, BATCH, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator) * scale
    targets = torch.randint(VOCABULARY, (TOKENS, BATCH), generator=generator)
    upstream = torch.randn(TOKENS, BATCH, generator=generator)
    upstream[0, 0] = 0
    return x.to(dtype), weight.to(dtype), targets, upstream


def plain(x, weight, targets, upstream):
    """Losses and gradients by F.cross_entropy, in float64."""
    x, weight = (tensor.double().detach().requires_grad_() for tensor in (x, weight))
    losses = F.cross_entropy((x @ weight.t()).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return [losses.detach(), *torch.autograd.grad(losses, (x, weight), upstream.double())]


def ours(x, weight, targets, upstream, **options):
    x, weight = (tensor.detach().requires_grad_() for tensor in (x, weight))
    losses = cross_entropy.head_cross_entropy(x, weight, targets, **options)
    return [losses.detach(), *torch.autograd.grad(losses, (x, weight), upstream)]


def largest_difference(found, expected):
    return max(((one.double() - other).norm() / other.norm().clamp(min=1e-30)).item()
               for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("rows", [1, 7, 29, 30, 1000])
def test_chunks_of_any_size_give_the_plain_values_and_gradients(monkeypatch, rows):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", rows * VOCABULARY)
    found = ours(*problem())
    assert found[0].dtype == torch.float32 and found[0].shape == (TOKENS, BATCH)
    assert largest_difference(found, plain(*problem())) < 1e-6


def test_a_zero_head_gives_the_logarithm_of_the_vocabulary_and_a_gradient():
    x, weight, targets, upstream = problem()
    losses, of_x, of_weight = ours(x, torch.zeros_like(weight), targets, upstream)
    assert losses.flatten().tolist() == pytest.approx([float(torch.tensor(96.0).log())] * 30, rel=1e-6)
    assert of_x.abs().max() == 0 and of_weight.abs().min() > 0


@pytest.mark.parametrize("dtype, loss_scale", [(torch.bfloat16, 1.0), (torch.float16, 1024.0)])
def test_half_precision_is_as_good_as_with_all_logits(monkeypatch, dtype, loss_scale):
    """Against float64 on the same rounded inputs, beside F.cross_entropy of float32 logits: at most 5 % worse."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 3 * VOCABULARY)
    x, weight, targets, upstream = problem(dtype, scale=0.5)
    upstream = upstream * loss_scale
    expected = plain(x, weight, targets, upstream)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight)]
    naive = F.cross_entropy((leaves[0] @ leaves[1].t()).float().flatten(0, 1), targets.flatten(), reduction="none")
    naive = [naive.detach().view_as(targets), *torch.autograd.grad(naive.view_as(targets), leaves, upstream)]
    found = ours(x, weight, targets, upstream)
    assert [part.dtype for part in found] == [torch.float32, dtype, dtype]
    for mine, other, truth in zip(found, naive, expected, strict=True):
        assert largest_difference([mine], [truth]) < 1.05 * largest_difference([other], [truth])


def test_only_the_gradients_that_are_asked_for_are_computed():
    x, weight, targets, upstream = problem()
    expected = plain(x, weight, targets, upstream)
    for asked in (0, 1):
        leaves = [x.clone(), weight.clone()]
        leaves[asked].requires_grad_()
        cross_entropy.head_cross_entropy(*leaves, targets).backward(upstream)
        assert leaves[1 - asked].grad is None
        assert largest_difference([leaves[asked].grad], [expected[1 + asked]]) < 1e-6


class Held(TorchDispatchMode):
    """The most bytes of tensors alive at once among those made within."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage):
        key = storage._cdata
        if storage.nbytes() and key not in self.seen:
            self.seen.add(key)
            self.held += storage.nbytes()
            self.most = max(self.most, self.held)
            weakref.finalize(storage, self._forget, key, storage.nbytes())

    def _forget(self, key, size):
        self.seen.discard(key)
        self.held -= size


def test_memory_is_at_most_a_quarter_of_that_of_all_logits(monkeypatch):
    """In small form; benchmarks/cross_entropy.py measures 32 x 256 codes of 16,384."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 64 * 1024)
    with loaded("cross_entropy") as benchmark:
        monkeypatch.setattr(benchmark, "VOCABULARY", 1024)
        inputs = benchmark.problem(1024, 16, torch.bfloat16, "cpu")
        most, parts = {}, {}
        for mode in ("naive", "ours"):
            with Held() as meter:
                parts[mode] = benchmark.gradients_of(mode, *inputs)
            most[mode] = meter.most
        assert most["naive"] > 1024 * 1024 * 4, "the meter should see the logits"
        assert most["ours"] < most["naive"] / 4
        assert max(benchmark.relative_differences(parts["ours"], parts["naive"])) < 1e-3


def test_each_direction_passes_over_the_logits_once(monkeypatch):
    """Beside matrix products: 6 bytes for each logit of bf16. Operations of PyTorch, forward float(), amax, sub_, exp_
    and sum, backward float(), sub_, exp_, mul_ and to(), move 30 and 36. On tensors without storage, which take the way
    of GPUs."""
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 1024 * 4096)
    x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True) for shape
                 in ((4096, 8), (4096, 8)))
    targets = torch.empty(4096, dtype=torch.int64, device="meta")
    with Costs() as costs:
        losses = cross_entropy.head_cross_entropy(x, weight, targets)
        torch.autograd.grad(losses, (x, weight), torch.empty_like(losses))
    assert [costs.operations.count(f"gigatok.{name}.default") for name
            in ("totals_and_picked", "become_gradient_")] == [4, 4]
    assert 6 <= costs.but_products / 4096**2 < 6.5


def losses_over_ranks(sequence_parallel):
    """On each of two tensor ranks: losses, gradient of this rank's part of x, gradient of its part of the weight."""
    cross_entropy.CHUNK_LOGITS = 7 * VOCABULARY // 2
    topology = start_process_group(tensor_size=2, sequence_parallel=sequence_parallel)
    x, weight, targets, upstream = problem()
    head = topology.layers.vocab_head(WIDTH, VOCABULARY)
    with torch.no_grad():
        head.weight.copy_(weight.chunk(2)[topology.tensor_rank])
    x = (x.chunk(2)[topology.tensor_rank] if sequence_parallel else x).requires_grad_()
    losses = head(x, targets)
    losses.backward(upstream)
    return losses.detach(), x.grad, head.weight.grad, topology.layers.full_features(head(x)).detach()


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_vocabulary_over_two_ranks(sequence_parallel):
    x, weight, targets, upstream = problem()
    losses, of_x, of_weight = plain(x, weight, targets, upstream)
    for rank, found in enumerate(run_ranks(losses_over_ranks, 2, sequence_parallel)):
        expected = [losses, of_x.chunk(2)[rank] if sequence_parallel else of_x, of_weight.chunk(2)[rank],
                    x.double() @ weight.double().t()]
        assert largest_difference(found, expected) < 3e-6
