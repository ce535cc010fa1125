"""torch.ops.gigatok against the materialised definition in float64, on every backend that this machine has."""

import functools

import pytest
import torch
import torch.nn.functional as F
from quantizer_problems import TEMPERATURE, assert_close, distances, materialised, penalty, problem
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from gigatok_ds import InputError
from gigatok_ds.config.model import QuantizerConfig
from gigatok_ds.kernels import build, native, reference
from gigatok_ds.kernels.ops import (
    assignment_entropy,
    assignment_statistics,
    code_histogram,
    entropy_penalty,
    nearest_code,
)
from gigatok_ds.models.quantizer import VectorQuantizer

ON_GPU = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda-torch", "cuda-native")]


@pytest.fixture(params=["cpu-torch", "cpu-native", "cpu-avx2", "cpu-portable", *ON_GPU])
def device(request, monkeypatch):
    """A device, with the operators held to one backend there: plain torch, the native kernels, or one of their levels.
    """
    device, choice = request.param.split("-")
    monkeypatch.setenv("GIGATOK_KERNELS", "torch" if choice == "torch" else "native")
    if choice == "torch":
        return device
    if missing := build.obstacles():
        pytest.skip(f"the native kernels cannot be compiled here: {'; '.join(missing)}")
    assert device in native.load().devices, native.load().reason
    if choice != "native":
        monkeypatch.setenv("GIGATOK_CPU_CAPABILITY", choice)
        try:
            assert torch.ops.gigatok_native.cpu_capability() == choice
        except RuntimeError as error:
            pytest.skip(str(error).splitlines()[0])
    return device


@pytest.fixture
def on_torch(monkeypatch):
    monkeypatch.setenv("GIGATOK_KERNELS", "torch")


GRID = [
    (1, 1, 8, "unit"), (5, 1, 3, "unit"), (1, 300, 8, "unit"), (7, 5, 4, "unit"), (65, 130, 1, "raw"),
    (100, 257, 8, "unit"), (513, 1024, 8, "unit"), (256, 512, 8, "raw"), (256, 512, 8, "collapsed"),
    (256, 512, 8, "duplicates"), (97, 1000, 5, "unit"), (300, 1000, 16, "unit"), (129, 500, 32, "unit"),
    (64, 300, 32, "raw"), (70, 777, 64, "unit"), (3, 262144, 4, "unit"),
]


@pytest.mark.parametrize("count, size, dim, kind", GRID)
def test_values_and_gradients_match_float64(device, count, size, dim, kind):
    tolerance = 1e-3 if kind == "collapsed" else 3e-5 if dim > 16 else 1e-5
    latents, codebook = problem(count, size, dim, kind)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(count, generator=generator) / count, torch.randn(size, generator=generator)
    exact = [x.double().requires_grad_() for x in (latents, codebook)]
    d, entropy, average, log_sum_exp = materialised(*exact)
    ours = [x.to(device).requires_grad_() for x in (latents, codebook)]
    statistics = assignment_statistics(*ours)

    assert (d.gather(1, statistics.codes.cpu()[:, None])[:, 0] - d.min(1).values).max() <= 1e-6
    assert torch.equal(statistics.codes, nearest_code(*ours))
    if kind == "duplicates":
        assert statistics.codes.max() < size // 4
    entropy_error = (statistics.entropy.cpu() - entropy).abs().max()
    assert entropy_error <= (3e-5 if dim > 16 else 1e-5) * max(entropy.abs().max().item(), 1)
    assert_close(statistics.average_probability, average, 1e-5 if kind != "collapsed" else 1e-3)
    assert_close(statistics.log_sum_exp, log_sum_exp, 1e-5)
    for weights in (None, upstream)[count <= 3:]:  # of few latents the penalty's two entropies cancel
        expected = torch.autograd.grad(penalty(entropy, average, weights), exact, retain_graph=True)
        found = torch.autograd.grad(penalty(statistics.entropy, statistics.average_probability, weights), ours,
                                    retain_graph=True)
        for ours_, expected_ in zip(found, expected, strict=True):
            if size == 1:  # a single code is certain: all gradients are zero
                assert ours_.abs().max() <= 1e-6
            else:
                assert_close(ours_, expected_, tolerance)


def test_indices_are_those_of_float64_wherever_the_margin_exceeds_a_millionth(device):
    latents, codebook = problem(4096, 2048, 8, seed=2)
    best, order = torch.cdist(latents.double(), codebook.double()).square().topk(2, largest=False)
    clear = best[:, 1] - best[:, 0] > 1e-6
    assert clear.float().mean() > 0.99
    assert torch.equal(nearest_code(latents.to(device), codebook.to(device)).cpu()[clear], order[clear, 0])


def test_exact_ties_go_to_the_lowest_index(device):
    codebook = torch.tensor([[2.0, 0], [0, 1], [1, 0], [0, 1], [1, 0], [-1, 0]])
    latents = torch.tensor([[0.0, 0], [1, 0], [0, 3], [-2, 0]])
    expected = torch.tensor([1, 2, 1, 5])
    assert torch.equal(nearest_code(latents.to(device), codebook.to(device)).cpu(), expected)
    assert torch.equal(assignment_statistics(latents.to(device), codebook.to(device)).codes.cpu(), expected)


def test_entropy_of_all_latents_is_the_sum_of_parts(device):
    latents, codebook = (x.to(device) for x in problem(300, 200, 8))
    full, first, second = (assignment_statistics(x, codebook) for x in (latents, latents[:100], latents[100:]))
    loss = assignment_entropy(latents, codebook, average=lambda q: (
        assert_close(q, full.average_probability.double(), 0), (first.average_probability + 2 *
                                                               second.average_probability) / 3)[1])
    assert loss.item() == pytest.approx(entropy_penalty(full).item(), rel=1e-5)


def test_no_latents(device):
    latents = torch.zeros(0, 8, device=device, requires_grad=True)
    codebook = problem(1, 20, 8)[1].to(device).requires_grad_()
    assert nearest_code(latents, codebook).shape == (0,)
    statistics = assignment_statistics(latents, codebook)
    assert statistics.codes.shape == statistics.entropy.shape == (0,)
    assert statistics.average_probability.tolist() == [0] * 20
    (statistics.entropy.sum() + statistics.average_probability.square().sum()).backward()
    assert latents.grad.shape == (0, 8) and codebook.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(device, dtype):
    """Half precision is computed in float32 and its gradient rounded once; float64 stays float64."""
    inputs = [x.to(device, dtype).requires_grad_() for x in problem(50, 60, 8)]
    exact = [x.detach().to("cpu", torch.float64).requires_grad_() for x in inputs]
    statistics, (_, entropy, average, _) = assignment_statistics(*inputs), materialised(*exact)
    assert statistics.entropy.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    assert_close(statistics.entropy, entropy, min(tolerance, 1e-5))
    found = torch.autograd.grad(entropy_penalty(statistics), inputs)
    for ours, expected in zip(found, torch.autograd.grad(penalty(entropy, average), exact), strict=True):
        assert ours.dtype == dtype
        assert_close(ours, expected, tolerance)


def test_memory_layout_does_not_matter(device):
    latents, codebook = (x.to(device) for x in problem(33, 70, 8))
    grid = latents.t().contiguous().t().requires_grad_()
    strided = torch.stack([codebook, codebook], 1)[:, 1].requires_grad_()
    assert not grid.is_contiguous() and not strided.is_contiguous()
    plain = [latents.requires_grad_(), codebook.requires_grad_()]
    assert torch.equal(nearest_code(grid, strided), nearest_code(*plain))
    found = torch.autograd.grad(assignment_entropy(grid, strided), [grid, strided])
    assert all(map(torch.equal, found, torch.autograd.grad(assignment_entropy(*plain), plain)))


def test_repeated_runs_agree_in_every_bit(device):
    inputs = [x.to(device).requires_grad_() for x in problem(700, 900, 8)]

    def run():
        statistics = assignment_statistics(*inputs)
        return *statistics, *torch.autograd.grad(entropy_penalty(statistics), inputs)

    assert all(map(torch.equal, run(), run()))


def test_autocast_changes_nothing(device):
    inputs = [x.to(device).requires_grad_() for x in problem(200, 300, 8)]
    outside = assignment_entropy(*inputs)
    with torch.autocast(device, torch.bfloat16):
        inside = assignment_entropy(*inputs)
        codes = nearest_code(*inputs)
        found = torch.autograd.grad(inside, inputs)
    assert torch.equal(inside, outside) and torch.equal(codes, nearest_code(*inputs))
    assert all(map(torch.equal, found, torch.autograd.grad(outside, inputs)))


@functools.cache  # seconds and gigabytes
def codes_of_the_original(device):
    """Those of its formulation under autocast, whose einsum is in bfloat16, of `problem(8192, 16384, 8)`."""
    latents, codebook = (x.to(device) for x in problem(8192, 16384, 8))
    with torch.autocast(device, torch.bfloat16):
        products = torch.einsum("nd,kd->nk", latents, codebook)
        return (latents.square().sum(1, keepdim=True) + codebook.square().sum(1) - 2 * products).argmin(1)


def test_half_precision_picks_other_codes(device):
    """The figure in docs/kernels.md is this one."""
    latents, codebook = (x.to(device) for x in problem(8192, 16384, 8))
    with torch.autocast(device, torch.bfloat16):
        theirs, ours = codes_of_the_original(device), nearest_code(latents, codebook)
    assert (theirs != ours).double().mean().item() == pytest.approx(0.056, abs=0.01)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_input_that_is_not_finite_is_named(device, bad):
    latents, codebook = (x.to(device) for x in problem(20, 30, 8))
    damaged, damaged_codes = latents.clone(), codebook.clone()
    damaged[[7, 12], 3] = damaged_codes[4, 0] = bad
    for function in (nearest_code, assignment_statistics):
        with pytest.raises(InputError, match="latent 7 of 20 holds nan or inf"):
            function(damaged, codebook)
        with pytest.raises(InputError, match="code 4 of 30 holds nan or inf"):
            function(latents, damaged_codes)
    expected = nearest_code(latents, codebook)
    expected[[7, 12]] = -1
    assert torch.equal(nearest_code(damaged, codebook, strict=False), expected)
    statistics = assignment_statistics(damaged, codebook, strict=False)
    assert torch.equal(statistics.codes, expected)
    assert statistics.entropy.isnan().nonzero().flatten().tolist() == [7, 12]
    assert not entropy_penalty(statistics).isfinite()
    exact = distances(latents.double(), codebook.double())
    exact[:, 4] = torch.inf
    assert torch.equal(nearest_code(latents, damaged_codes, strict=False), exact.argmin(1))


def test_histogram(device):
    codes = torch.randint(-1, 12, (50, 7), generator=torch.Generator().manual_seed(0)).to(device)
    valid = codes[(codes >= 0) & (codes < 10)]
    assert torch.equal(code_histogram(codes, 10), torch.bincount(valid, minlength=10))
    assert torch.equal(code_histogram(codes.t().int(), 10), torch.bincount(valid, minlength=10))
    assert code_histogram(codes[:0], 3).tolist() == [0, 0, 0]


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu():
    inputs = [x.cuda().requires_grad_() for x in problem(500, 700, 8)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        statistics = assignment_statistics(*inputs, strict=False)
        entropy_penalty(statistics).backward()
        code_histogram(nearest_code(*inputs, strict=False), 700)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradcheck(on_torch):
    latents, codebook = (x.double().requires_grad_() for x in problem(6, 9, 3))
    function = functools.partial(assignment_statistics, temperature=0.3)
    assert torch.autograd.gradcheck(lambda z, e: function(z, e)[:2], (latents, codebook))


def test_opcheck(device):
    latents, codebook = (x.to(device) for x in problem(9, 20, 8))
    codes = nearest_code(latents, codebook)
    operators = torch.ops.gigatok
    differentiable = latents.clone().requires_grad_(), codebook.clone().requires_grad_()
    torch.library.opcheck(operators.nearest_code, (latents, codebook))
    torch.library.opcheck(operators.assignment_statistics, (*differentiable, TEMPERATURE, False), atol=1e-5, rtol=1e-5)
    state = operators.assignment_statistics(latents, codebook, TEMPERATURE)[4]
    gradients = latents.new_ones(9), codebook.new_ones(20)
    torch.library.opcheck(operators.assignment_gradients, (latents, codebook, codes, state, *gradients, TEMPERATURE))
    torch.library.opcheck(operators.code_histogram, (codes, 20))


def test_compiled_without_graph_breaks(device):
    inputs = [x.to(device).requires_grad_() for x in problem(40, 50, 8)]

    def step(latents, codebook):
        statistics = assignment_statistics(F.normalize(latents, dim=1), codebook, strict=False)
        return entropy_penalty(statistics), code_histogram(nearest_code(latents, codebook), 50)

    eager, compiled = step(*inputs), torch.compile(step, fullgraph=True, backend="aot_eager")(*inputs)
    assert torch.equal(eager[1], compiled[1])
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(torch.autograd.grad(compiled[0], inputs), torch.autograd.grad(eager[0], inputs))


def test_exported(device):
    class Codes(torch.nn.Module):
        def forward(self, latents, codebook):
            return nearest_code(latents, codebook), assignment_statistics(latents, codebook).average_probability

    latents, codebook = (x.to(device) for x in problem(40, 50, 8))
    shapes = {"latents": {0: torch.export.Dim("latents")}, "codebook": None}
    exported = torch.export.export(Codes(), (latents, codebook), dynamic_shapes=shapes).module()
    assert all(map(torch.equal, exported(latents[:13], codebook), Codes()(latents[:13], codebook)))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_under_activation_checkpointing(device, reentrant):
    inputs = [x.to(device).requires_grad_() for x in problem(40, 50, 8)]
    again = checkpoint(assignment_entropy, *inputs, use_reentrant=reentrant)
    again.backward()
    expected = torch.autograd.grad(assignment_entropy(*inputs), inputs)
    assert all(torch.equal(x.grad, gradient) for x, gradient in zip(inputs, expected, strict=True))


def test_a_second_derivative_is_refused(device):
    inputs = [x.to(device).requires_grad_() for x in problem(10, 12, 8)]
    gradient, = torch.autograd.grad(assignment_entropy(*inputs), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once only"):
        gradient.sum().backward()


def test_the_reference_never_holds_all_distances():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **kwargs or {})
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.untyped_storage().nbytes() // 8)
            return result

    latents, codebook = problem(1500, 2048, 8)
    with Largest() as largest:
        indices, entropy, average, _ = reference.entropy_forward(latents, codebook, TEMPERATURE)
        reference.entropy_backward(latents, codebook, entropy, average, TEMPERATURE)
        assert torch.equal(indices, reference.nearest_code(latents, codebook))
    assert 0 < largest.elements <= 1 << 20 < 1500 * 2048


def test_the_quantizer_hands_damage_to_the_training_loop_and_names_it_elsewhere(device):
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=30, codebook_dim=8)).to(device)
    latents, codebook = (x.to(device) for x in problem(20, 30, 8))
    latents = latents.t().reshape(1, 8, 1, 20).contiguous()
    with torch.no_grad():
        quantizer.embedding.copy_(codebook)
    damaged = latents.clone()
    damaged[0, 2, 0, 5] = torch.inf
    output = quantizer(damaged, entropy="global")
    assert output.codes[0, 5] == -1 and (output.codes[0, :5] >= 0).all()
    assert output.quantized[0, :, 0, 5].isnan().all()
    assert all(loss.isnan() for loss in output.losses)
    assert 0 < quantizer.record_usage(output.codes) <= 20 / 30
    assert all(loss.isfinite() for loss in quantizer(latents, entropy="global").losses)
    with pytest.raises(InputError, match="latent 5 of 20"):
        quantizer.eval()(damaged)
    with torch.no_grad():
        quantizer.embedding[11] = torch.nan
    with pytest.raises(InputError, match="code 11 of 30"):
        quantizer(latents)
    assert quantizer.train()(latents).losses.codebook.isnan()


@pytest.mark.parametrize("gradient", ["rotation", "straight_through"])
def test_the_quantizer_compiles_whole(device, gradient):
    quantizer = VectorQuantizer(QuantizerConfig(codebook_size=30, codebook_dim=8, gradient=gradient)).to(device)
    latents, codebook = (x.to(device) for x in problem(20, 30, 8))
    with torch.no_grad():
        quantizer.embedding.copy_(codebook)
    latents = latents.t().reshape(1, 8, 4, 5).requires_grad_()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")

    def step(module):
        output = module(latents, entropy="global")
        total = sum(output.losses) + output.quantized.square().sum()
        return output.codes, *torch.autograd.grad(total, [latents, quantizer.embedding])

    torch.testing.assert_close(step(compiled), step(quantizer))


def test_shapes_that_do_not_fit_are_refused(on_torch):
    for latents, codebook in (((3, 4), (5, 6)), ((3,), (5, 3)), ((3, 4), (0, 4))):
        with pytest.raises(InputError, match="must be \\(N, D\\) and \\(K, D\\)"):
            nearest_code(torch.zeros(latents), torch.zeros(codebook))


@pytest.mark.parametrize("place, change", [
    (2, lambda indices: indices.int()), (2, lambda indices: indices[:-1]), (2, lambda indices: indices.repeat(2)[::2]),
    (3, lambda state: state.double()), (3, lambda state: state.t().contiguous().t()),
    (3, lambda state: state[:, :3].contiguous()),
    (4, lambda gradient: gradient.half()), (5, lambda gradient: gradient[:3]),
    (5, lambda gradient: gradient.repeat_interleave(2)[::2]),
])
def test_the_backward_kernel_refuses_what_it_would_misread(device, place, change):
    latents, codebook = (x.to(device) for x in problem(20, 30, 8))
    if (kernels := native.kernels_for(latents, codebook)) is None:
        pytest.skip("plain torch reads any tensor")
    indices, entropy, average, state = kernels.entropy_forward(latents, codebook, TEMPERATURE)
    arguments = [latents, codebook, indices, state, entropy, average]
    kernels.entropy_backward(*arguments, TEMPERATURE)
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match="must be contiguous"):
        kernels.entropy_backward(*arguments, TEMPERATURE)


def test_forcing_a_backend(monkeypatch):
    latents, codebook = problem(3, 4, 8)
    monkeypatch.setenv("GIGATOK_KERNELS", "fast")
    with pytest.raises(InputError, match="GIGATOK_KERNELS is 'fast'; choose one of auto, native, torch"):
        nearest_code(latents, codebook)
    monkeypatch.setattr(native, "load", lambda: native.Library(reason="no C++ compiler"))
    monkeypatch.setenv("GIGATOK_KERNELS", "native")
    with pytest.raises(InputError, match="no native kernels: no C\\+\\+ compiler"):
        nearest_code(latents, codebook)
    monkeypatch.setenv("GIGATOK_KERNELS", "auto")
    assert nearest_code(latents, codebook).shape == (3,)
