"""What the CUDA kernels' blocks and warps compute, run on this machine's CPU from the same headers, against float64."""

import ctypes
import subprocess

import pytest
import torch
import torch.nn.functional as F
from places import TESTS
from quantizer_problems import CASES, TEMPERATURE, assert_close, materialised, penalty, problem

from gigatok_ds.kernels import build, reference

SOURCE = TESTS / "native" / "blocks.cpp"


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


def warp_search(blocks, latents, codebook, wanted, *, planned=None, errors=True):
    """Indices, the largest error of a half-precision score as a part of its bound, the number of splits, and how often
    a warp computed distances again. Splits are those of `planned` latents."""
    indices, error, looks = torch.full((len(latents),), -7), ctypes.c_double(), ctypes.c_int64()
    splits = blocks.warp_search(*sizes(latents, codebook), planned or len(latents), wanted, address(indices),
                                ctypes.byref(looks), ctypes.byref(error) if errors else None)
    return indices, error.value, splits, looks.value


def block_search(blocks, latents, codebook, wanted):
    """Indices of the search in float32."""
    indices = torch.full((len(latents),), -7)
    blocks.block_search(*sizes(latents, codebook), wanted, address(indices))
    return indices


@pytest.mark.parametrize("wanted", [1, 7, 100])
@pytest.mark.parametrize("count, size, dim, kind", [*CASES, (70, 200, 24, "unit")])
def test_blocks_find_the_nearest_code(blocks, count, size, dim, kind, wanted):
    latents, codebook = problem(count, size, dim, kind)
    assert_nearest(block_search(blocks, latents, codebook, wanted), latents, codebook, kind)


@pytest.mark.parametrize("wanted", [1, 7, 100])
@pytest.mark.parametrize("count, size, dim, kind", CASES)
def test_warps_find_the_nearest_code_and_keep_their_bound(blocks, count, size, dim, kind, wanted):
    latents, codebook = problem(count, size, dim, kind)
    indices, error, splits, _ = warp_search(blocks, latents, codebook, wanted)
    assert_nearest(indices, latents, codebook, kind)
    assert torch.equal(indices, block_search(blocks, latents, codebook, wanted))
    assert error < 1 and (splits > 1) == (wanted > 1 and size > 128)


DIFFICULT = {
    "every code the same": lambda z, e: (z, e[:1].expand_as(e)),
    "latents on codes": lambda z, e: (e[torch.arange(len(z)) % len(e)], e),
    "every code twice, apart": lambda z, e: (z, e[torch.arange(len(e)) % (len(e) // 2)]),
    "codes within 1e-4": lambda z, e: (z, e[:1] + 1e-4 * e),
    "codes within 1e-7": lambda z, e: (z, e[:1] + 1e-7 * e),
    "long and short": lambda z,
    e: (z * torch.logspace(-6, 3, len(z))[:, None], e * torch.logspace(3, -6, len(e))[:, None]),
    "latents far away": lambda z, e: (z * 1e6, e),
    "latents at zero": lambda z, e: (z * 0, e),
    "codes at zero": lambda z, e: (z, e * 0),
    "codes missing at the ends": lambda z, e: (z, torch.cat([e[:5] * torch.inf, e[5:-7], e[-7:] * torch.nan])),
    "one code left": lambda z, e: (z, torch.cat([e[:-1] * torch.nan, e[-1:]])),
    "no code left": lambda z, e: (z, e * torch.nan),
    "no latent left": lambda z, e: (z * torch.inf, e),
}


@pytest.mark.parametrize("dim", range(1, 9))
@pytest.mark.parametrize("kind", DIFFICULT)
def test_the_filter_changes_no_index(blocks, kind, dim):
    """Bit for bit those of the float32 search: the lowest of equally near codes, and -1 where there is none."""
    for count, size, wanted in ((40, 1, 1), (70, 129, 9), (300, 900, 5)):
        latents, codebook = (x.contiguous() for x in DIFFICULT[kind](*problem(count, size + size % 2, dim)))
        expected = block_search(blocks, latents, codebook, wanted)
        for splits in (1, wanted):
            assert torch.equal(warp_search(blocks, latents, codebook, splits, errors=False)[0], expected)
        if kind in ("no code left", "no latent left"):
            assert expected.max() == -1


# Instructions of a warp in what nvcc 13.0 makes of filter.h and recheck.h for sm_90 (nvdisasm): for a tile of the
# filter, and at most for a latent that is looked at again and for 32 distances of it.
TILE, LATENT, LOOK = 30, 200, 90
MULTIPROCESSORS = 132  # of an H100


@pytest.mark.parametrize("kind", ["unit", "near"])
@pytest.mark.parametrize("count, sample", [
    (8192, 64), (65536, 64), *(pytest.param(count, 4096, marks=pytest.mark.slow) for count in (8192, 65536))])
def test_looking_again_costs_less_than_half_the_filter(blocks, count, sample, kind):
    """At training's number of latents and codes, for some of the latents, since all are of one distribution."""
    latents, codebook = problem(sample, 16384, 8)
    if kind == "near":
        latents = F.normalize(codebook[torch.arange(sample) * 3] + 0.1 * latents, dim=-1)
    indices, _, splits, looks = warp_search(blocks, latents, codebook, 4 * MULTIPROCESSORS, planned=count, errors=False)
    assert splits == {8192: 16, 65536: 2}[count]
    assert torch.equal(indices, reference.nearest_code(latents, codebook))
    filtering = TILE * (16384 // 8) / 64  # for a latent: a warp has 64
    assert LATENT + LOOK * looks / sample < 0.5 * filtering


def test_where_all_codes_compete_each_is_looked_at_once(blocks):
    latents, codebook = problem(100, 2048, 8)
    *_, looks = warp_search(blocks, latents, codebook[:1] + 1e-5 * codebook, 4, errors=False)
    assert looks == len(latents) * len(codebook) // 32


def assert_nearest(indices, latents, codebook, kind):
    distances = materialised(latents.double(), codebook.double())[0]
    assert (distances.gather(1, indices[:, None])[:, 0] - distances.min(1).values).max() <= 1e-6
    if kind == "duplicates":
        assert indices.max() < len(codebook) // 4


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 3e4, 1e9])
def test_the_filter_holds_at_every_scale(blocks, scale):
    latents, codebook = problem(100, 300, 8, "raw")
    latents, codebook = latents * scale, codebook * scale
    indices, error, *_ = warp_search(blocks, latents, codebook, 7)
    assert torch.equal(indices, reference.nearest_code(latents, codebook)) and error < 1


def test_codes_and_latents_that_are_not_finite(blocks):
    latents, codebook = problem(100, 300, 8)
    latents[3], codebook[:290] = torch.nan, torch.inf
    expected = reference.nearest_code(latents, codebook)
    assert expected[3] == -1 and expected.max() >= 290
    assert torch.equal(block_search(blocks, latents, codebook, 7), expected)
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
    for ours, expected in zip(gradients, torch.autograd.grad(penalty(exact_entropy, exact_average, upstream), exact),
                              strict=True):
        assert_close(ours, expected, tolerance)
