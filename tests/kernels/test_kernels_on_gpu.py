"""What only a GPU can show of the native kernels: tails of every size, streams, CUDA graphs, Inductor's code around
them.
"""

import pytest
import torch
import torch.nn.functional as F
from quantizer_problems import CASES, materialised, problem

from gigatok_ds.kernels import native, reference
from gigatok_ds.kernels.ops import assignment_statistics, code_histogram, entropy_penalty, nearest_code

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def native_kernels(monkeypatch):
    monkeypatch.setenv("GIGATOK_KERNELS", "native")
    if "cuda" not in native.load().devices:
        pytest.skip(f"no native CUDA kernels: {native.load().reason or 'the library has none'}")


def on_gpu(*arguments, **options):
    return [tensor.cuda() for tensor in problem(*arguments, **options)]


@pytest.mark.parametrize("tensor_cores", ["0", "1"])
@pytest.mark.parametrize("count, size, dim, kind",
                         [*CASES, (70, 200, 24, "unit"), (33, 129, 40, "unit"), (31, 127, 64, "raw")])
def test_either_search_finds_the_nearest_code(monkeypatch, count, size, dim, kind, tensor_cores):
    monkeypatch.setenv("GIGATOK_TENSOR_CORES", tensor_cores)
    latents, codebook = problem(count, size, dim, kind)
    codes = nearest_code(latents.cuda(), codebook.cuda()).cpu()
    distances = materialised(latents.double(), codebook.double())[0]
    assert (distances.gather(1, codes[:, None])[:, 0] - distances.min(1).values).max() <= 1e-6
    if kind == "duplicates":
        assert codes.max() < size // 4


@pytest.mark.parametrize("count", [1, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257, 1000, 8191])
def test_tails_of_every_size(count):
    latents, codebook = on_gpu(count, 1021, 8, seed=count)
    best, order = torch.cdist(latents.double(), codebook.double()).square().topk(2, largest=False)
    clear = best[:, 1] - best[:, 0] > 1e-6
    assert torch.equal(nearest_code(latents, codebook)[clear], order[clear, 0])


def test_at_the_size_of_training_the_searches_agree(monkeypatch):
    latents, codebook = on_gpu(8192, 16384, 8)
    found = []
    for tensor_cores in ("0", "1"):
        monkeypatch.setenv("GIGATOK_TENSOR_CORES", tensor_cores)
        found.append(nearest_code(latents, codebook))
    assert torch.equal(*found)
    assert (found[0] != reference.nearest_code(latents, codebook)).float().mean() < 1e-3  # near-ties alone


def test_on_a_side_stream():
    """The inputs are made on that stream while another is busy; kernels on the wrong stream would read what is not
    there yet.
    """
    latents, codebook = on_gpu(700, 900, 8)
    expected = nearest_code(latents, codebook)
    stream, big = torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        late = latents + (big @ big).mean() * 0
        codes = nearest_code(late, codebook, strict=False)
        histogram = code_histogram(codes, 900)
    stream.synchronize()
    assert torch.equal(codes, expected)
    assert torch.equal(histogram, torch.bincount(expected, minlength=900))


def test_captured_in_a_cuda_graph():
    """Replayed on other latents, the graph gives what a call on them gives."""
    latents, codebook = on_gpu(500, 700, 8)
    others, _ = on_gpu(500, 700, 8, seed=5)
    fixed = latents.clone().requires_grad_()

    def step():
        statistics = assignment_statistics(fixed, codebook, strict=False)
        return statistics.codes, *torch.autograd.grad(entropy_penalty(statistics), [fixed])

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for values in (latents, others, latents):
        with torch.no_grad():
            fixed.copy_(values)
        graph.replay()
        assert all(map(torch.equal, captured, step()))


def test_compiled_by_inductor():
    inputs = [tensor.requires_grad_() for tensor in on_gpu(400, 500, 8)]

    def step(latents, codebook):
        statistics = assignment_statistics(F.normalize(latents, dim=1), codebook, strict=False)
        return entropy_penalty(statistics), nearest_code(latents, codebook, strict=False)

    eager, compiled = step(*inputs), torch.compile(step, fullgraph=True)(*inputs)
    assert torch.equal(eager[1], compiled[1])
    torch.testing.assert_close(compiled[0], eager[0])
    torch.testing.assert_close(torch.autograd.grad(compiled[0], inputs), torch.autograd.grad(eager[0], inputs))
