"""Group norm's kernels in Triton: interpreted against float64, compiled for GPUs without one, counted without storage.
"""

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from dispatch_modes import Counter
from group_norm_cases import CASES, ROUNDING
from places import HELPERS
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from gigatok_ds.kernels import group_norm_ops
from gigatok_ds.models.cnn_blocks import AdaptiveGroupNorm, ResidualBlock
from gigatok_ds.models.group_norm import GroupNorm, GroupNormSiLU

needs_triton = pytest.mark.skipif(not group_norm_ops.HAS_TRITON, reason="no Triton on this machine")


@functools.cache
def interpreted(cases):
    """The results of all cases of a kind, twice each, from a process whose Triton interprets."""
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.pt"
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, HELPERS / "group_norm_cases.py", cases, results], env=environment, check=True)
        return torch.load(results)


@needs_triton
@pytest.mark.parametrize("cases, name", [
    *(("quick", name) for name in CASES["quick"]),
    *(pytest.param("slow", name, marks=pytest.mark.slow) for name in CASES["slow"])])
def test_the_kernels_agree_with_float64(cases, name):
    case, (ours, again) = CASES[cases][name], interpreted(cases)[name]
    far = abs(case.mean) / case.spread * 2**-24
    for mine, repeated, expected in zip(ours, again, case.expected(), strict=True):
        assert mine.dtype == case.dtype and mine.shape == expected.shape
        assert torch.equal(mine, repeated)
        tolerance = ROUNDING[case.dtype] + 16 * far
        assert (mine.double() - expected).abs().max() <= tolerance * expected.abs().max()
    assert all(map.is_contiguous(memory_format=torch.channels_last) for map in ours[:2])


class Recorded:
    """In a kernel's place: notes the grid and the arguments of each launch."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return lambda *args, **constants: self.launches.append((self.kernel, grid, args, constants))


def launches_of(monkeypatch, shape, dtype, *, groups=32, per_sample=False, silu=True):
    """(kernel, grid, arguments, constants) of each launch, forward and backward, of maps without storage."""
    triton = pytest.importorskip("triton", reason="no Triton on this machine")
    from gigatok_ds.kernels import group_norm_triton as module

    launches = []
    for name, kernel in list(vars(module).items()):
        if isinstance(kernel, triton.JITFunction):
            monkeypatch.setattr(module, name, Recorded(kernel, launches))
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty(shape[:2] if per_sample else shape[1:2], dtype=dtype, device="meta")
    mean, rstd = module.statistics(x, groups, 1e-6)
    y = module.normalized(x, mean, rstd, weight, weight, silu)
    sums = module.sums(y, x, mean, rstd, weight, weight, silu)
    module.gradients(y, x, mean, rstd, weight, weight, *sums, silu)
    monkeypatch.undo()
    return launches


def compiled(kernel, args, constants, architecture):
    """The assembler's report on a kernel as these arguments specialise it, and its PTX."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
    signature, constants, attributes = {}, dict(constants), {}
    for index, (name, value) in enumerate(zip(kernel.arg_names, args, strict=False)):
        if isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, int) and value == 1:
            constants[name] = 1
        elif isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            attributes[index,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    assert set(signature) == set(kernel.arg_names)
    at = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature={name: signature[name] for name in kernel.arg_names}, constexprs=at,
                       attrs=attributes)
    ptx = triton.compile(source, target=GPUTarget("cuda", architecture, 32)).asm["ptx"]
    assembler = triton.knobs.nvidia.ptxas if architecture < 100 else triton.knobs.nvidia.ptxas_blackwell
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        suffix = "a" if architecture >= 90 else ""
        command = [assembler.path, "-v", f"--gpu-name=sm_{architecture}{suffix}", path, "-o",
                   path.with_suffix(".cubin")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr, ptx


def check_compiled(launches, architecture):
    for kernel, _, args, constants in launches:
        report, ptx = compiled(kernel, args, constants, architecture)
        spilled = re.findall(r"(\d+) bytes spill", report)
        assert spilled and not any(map(int, spilled)), (kernel.__name__, constants, report)
        assert int(re.search(r"Used (\d+) registers", report)[1]) <= 128  # at least four blocks of 128 threads fit
        if "POSITIONS" in constants:  # sixteen bytes a thread and load
            assert re.search(r"ld\.global(\.\w+)*\.v4\.b32", ptx), kernel.__name__
        assert "atom." not in ptx and "red.global" not in ptx  # which would add in any order


def test_the_largest_kernels_compile_for_a_gpu_without_spilling(monkeypatch):
    launches = launches_of(monkeypatch, (16, 128, 256, 256), torch.bfloat16)
    check_compiled([launch for launch in launches if launch[0].__name__ in ("_moments", "_input_gradient")], 90)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("dtype", group_norm_ops.DTYPES)
@pytest.mark.parametrize("options", [{}, {"silu": False}, {"silu": False, "per_sample": True}], ids=str)
def test_every_kernel_compiles_for_gpus_without_spilling(monkeypatch, architecture, dtype, options):
    for shape in ((16, 128, 256, 256), (1, 512, 16, 16), (2, 96, 17, 13)):
        launches = launches_of(monkeypatch, shape, dtype, **options)
        assert len(launches) == (6 if options.get("per_sample") else 7)
        check_compiled(launches, architecture)


@needs_triton
@pytest.mark.parametrize("batch, channels, side", [
    (1, 512, 16), (16, 512, 16), (1, 256, 32), (16, 256, 64), (1, 128, 128), (16, 128, 256), (1, 128, 256),
    (1, 1024, 16)])
def test_there_are_enough_programs_for_a_gpu(monkeypatch, batch, channels, side):
    for kernel, grid, _, constants in launches_of(monkeypatch, (batch, channels, side, side), torch.bfloat16):
        if "POSITIONS" in constants:
            # Each of 128 threads on each of 132 multiprocessors, or no more than a tile for each.
            tiles = batch * channels * side * side / (constants["POSITIONS"] * constants["CHANNELS"])
            assert grid[0] * grid[1] >= min(tiles, 132), (kernel.__name__, grid)
            assert grid[1] <= 65535


@needs_triton
def test_a_samples_chunks_do_not_depend_on_the_batch(monkeypatch):
    """So that what a sample becomes does not, either."""
    for shape in ((128, 256, 256), (512, 16, 16)):
        one, many = (launches_of(monkeypatch, (batch, *shape), torch.bfloat16)[0] for batch in (1, 16))
        assert one[1][0] * 16 == many[1][0] and one[2][-1] == many[2][-1] and one[3] == many[3]


def without_storage(*shape, dtype=torch.bfloat16):
    x = torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=torch.channels_last)
    return x.requires_grad_()


def adaptive(channels):
    module = AdaptiveGroupNorm(channels, 16)
    weights = torch.empty(16, channels, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return lambda x: group_norm_ops.group_norm(x, weights, weights, module.norm.num_groups, module.norm.eps, silu=False)


@pytest.mark.parametrize("build", [
    lambda: GroupNormSiLU(32, 128, eps=1e-6).to("meta", torch.bfloat16),
    lambda: GroupNorm(32, 128, eps=1e-6).to("meta", torch.bfloat16), lambda: adaptive(128)],
    ids=["with SiLU", "alone", "adaptive"])
def test_a_norm_on_a_gpu_is_two_operations_each_way(build):
    """It was 17 operations and 34 bytes an element forward, 34 and 78 backward. An operator's bytes are its kernels':
    the sums that lie between two kernels of one are below a tenth of a byte an element."""
    norm, x = build(), without_storage(16, 128, 256, 256)
    with Counter() as forward:
        y = norm(x)
    assert y.dtype == x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert forward.names == ["group_norm_statistics", "group_norm_normalized"]
    assert 6 <= forward.bytes / x.numel() < 6.1
    upstream = torch.empty_like(y)
    with Counter() as backward:
        gradient, = torch.autograd.grad(y, x, upstream)
    assert gradient.is_contiguous(memory_format=torch.channels_last)
    assert backward.names == ["group_norm_sums", "group_norm_gradients"]
    assert 10 <= backward.bytes / x.numel() < 10.1


@needs_triton
def test_what_lies_between_two_kernels_is_small(monkeypatch):
    shape = (16, 128, 256, 256)
    parts = [argument.nbytes for _, _, args, _ in launches_of(monkeypatch, shape, torch.bfloat16)
             for argument in args if isinstance(argument, torch.Tensor) and argument.shape != shape]
    assert sum(parts) < 0.2 * torch.Size(shape).numel()


def test_without_triton_and_for_other_maps_torch_computes(monkeypatch):
    norm = GroupNormSiLU(4, 8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        maps = torch.empty(2, 8, 4, 4, device="cuda",
                           dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
        assert group_norm_ops.suits(maps) == group_norm_ops.HAS_TRITON
        assert not group_norm_ops.suits(maps.contiguous()) and not group_norm_ops.suits(maps.double())
        monkeypatch.setattr(group_norm_ops, "HAS_TRITON", False)
        assert not group_norm_ops.suits(maps)
        with Counter() as counter:
            y = norm.to("cuda")(maps)
    assert "native_group_norm" in counter.names and "group_norm_statistics" not in counter.names
    assert y.dtype == maps.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert not group_norm_ops.suits(torch.empty(2, 8, 4, 4).contiguous(memory_format=torch.channels_last))


def test_a_residual_block_compiles_whole():
    """With the operators in it, traced as a GPU's would be, as far as this machine goes: to the graph that Inductor
    gets.
    """
    from torch._dynamo.testing import CompileCounterWithBackend

    block = ResidualBlock(32, 32).to("meta", torch.bfloat16)
    backend = CompileCounterWithBackend("aot_eager")
    y = torch.compile(block, backend=backend, fullgraph=True)(without_storage(2, 32, 16, 16))
    y.sum().backward()
    assert backend.frame_count == 1 and y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norm", [GroupNormSiLU, GroupNorm])
def test_what_activation_checkpointing_computes_again_is_asked_for_once(norm):
    """It hands out what was saved for a backward pass a single time. On tensors without storage, which take the way of
    GPUs.
    """
    with torch.device("meta"):
        module, x = norm(32, 64, eps=1e-6), torch.empty(2, 64, 8, 8, requires_grad=True)
    checkpoint(module, x, use_reentrant=False).sum().backward()
    assert x.grad.shape == x.shape and module.weight.grad.shape == (64,)
