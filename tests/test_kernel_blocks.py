"""What the CUDA kernels' blocks and warps compute, run on this machine's CPU from the same headers, against float64."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from gigatok_ds.kernels import build, reference
from test_kernel_ops import TEMPERATURE, assert_close, materialised, penalty, problem

SOURCE = Path(__file__).parent / "native" / "blocks.cpp"


@pytest.fixture(scope="session")
def blocks(tmp_path_factory):
    if not (compiler := build.compiler()):
        pytest.skip("no C++ compiler")
    library = tmp_path_factory.mktemp("native") / "blocks.so"
    subprocess.run([compiler, "-std=c++20", "-O2", "-Wno-psabi", "-shared", "-fPIC", f"-I{build.SOURCES}", SOURCE, "-o",
                    library], check=True)
    found = ctypes.CDLL(str(library))
    found.warp_search.restype = ctypes.c_int64
    return found


def address(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def sizes(latents, codebook):
    return (address(latents), len(latents), address(codebook), len(codebook), latents.shape[1])


def warp_search(blocks, latents, codebook, wanted):
    """Indices, the largest error of a half-precision score as a part of its bound, and the number of splits."""
    indices, error = torch.full((len(latents),), -7), ctypes.c_double()
    splits = blocks.warp_search(*sizes(latents, codebook), wanted, address(indices), ctypes.byref(error))
    return indices, error.value, splits


CASES = [(1, 1, 8, "unit"), (1, 700, 8, "unit"), (257, 300, 4, "unit"), (300, 1000, 8, "unit"), (130, 513, 8, "raw"),
         (200, 512, 8, "duplicates"), (150, 400, 5, "unit"), (200, 256, 8, "collapsed")]


@pytest.mark.parametrize("wanted", [1, 7, 100])
@pytest.mark.parametrize("count, size, dim, kind", [*CASES, (70, 200, 24, "unit")])
def test_blocks_find_the_nearest_code(blocks, count, size, dim, kind, wanted):
    latents, codebook = problem(count, size, dim, kind)
    indices = torch.full((count,), -7)
    blocks.block_search(*sizes(latents, codebook), wanted, address(indices))
    assert_nearest(indices, latents, codebook, kind)


@pytest.mark.parametrize("wanted", [1, 7, 100])
@pytest.mark.parametrize("count, size, dim, kind", CASES)
def test_warps_find_the_nearest_code_and_keep_their_bound(blocks, count, size, dim, kind, wanted):
    latents, codebook = problem(count, size, dim, kind)
    indices, error, splits = warp_search(blocks, latents, codebook, wanted)
    assert_nearest(indices, latents, codebook, kind)
    assert error < 1 and (splits > 1) == (wanted > 1 and size > 128)


def assert_nearest(indices, latents, codebook, kind):
    distances = materialised(latents.double(), codebook.double())[0]
    assert (distances.gather(1, indices[:, None])[:, 0] - distances.min(1).values).max() <= 1e-6
    if kind == "duplicates":
        assert indices.max() < len(codebook) // 4


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 3e4, 1e9])
def test_the_filter_holds_at_every_scale(blocks, scale):
    latents, codebook = problem(100, 300, 8, "raw")
    latents, codebook = latents * scale, codebook * scale
    indices, error, _ = warp_search(blocks, latents, codebook, 7)
    assert torch.equal(indices, reference.nearest_code(latents, codebook)) and error < 1


def test_codes_and_latents_that_are_not_finite(blocks):
    latents, codebook = problem(100, 300, 8)
    latents[3], codebook[:290] = torch.nan, torch.inf
    expected = reference.nearest_code(latents, codebook)
    assert expected[3] == -1 and expected.max() >= 290
    indices = torch.full((100,), -7)
    blocks.block_search(*sizes(latents, codebook), 7, address(indices))
    assert torch.equal(indices, expected)
    assert torch.equal(warp_search(blocks, latents, codebook, 7)[0], expected)


@pytest.mark.parametrize("wanted", [1, 7, 100])
@pytest.mark.parametrize("count, size, dim, kind", [*CASES[2:], (70, 200, 24, "unit")])
def test_blocks_compute_statistics_and_gradients(blocks, count, size, dim, kind, wanted):
    tolerance = 1e-3 if kind == "collapsed" else 3e-5 if dim > 16 else 1e-5
    latents, codebook = problem(count, size, dim, kind)
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(count, generator=generator) / count, torch.randn(size, generator=generator)
    indices, entropy, average = torch.full((count,), -7), torch.empty(count), torch.empty(size)
    gradients = torch.empty_like(latents), torch.empty_like(codebook)
    blocks.block_penalty(*sizes(latents, codebook), wanted, ctypes.c_double(TEMPERATURE), *map(address, upstream),
                         *map(address, (indices, entropy, average, *gradients)))
    exact = [x.double().requires_grad_() for x in (latents, codebook)]
    _, exact_entropy, exact_average, _ = materialised(*exact)
    assert (entropy - exact_entropy).abs().max() <= 1e-5 * max(exact_entropy.max().item(), 1)
    assert_close(average, exact_average, 1e-5 if kind != "collapsed" else 1e-3)
    for ours, expected in zip(gradients, torch.autograd.grad(penalty(exact_entropy, exact_average, upstream), exact)):
        assert_close(ours, expected, tolerance)
