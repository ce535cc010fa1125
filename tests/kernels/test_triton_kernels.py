"""The kernels for GPUs that are written in Triton: by its interpreter beside their formulas, and compiled. No GPU is
needed.
"""

import importlib
import os
import subprocess
import sys

import pytest
import torch

ARCHITECTURES = (80, 90, 100)
HERE = os.path.dirname(__file__)


def values(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def close(found, expected, tolerance):
    """Within that; the interpreter cuts what a GPU rounds to bf16."""
    tolerance = max(tolerance, 2**-7) if expected.dtype == torch.bfloat16 else tolerance
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def dropout():
    from gigatok_ds.kernels.dropout_mask import dropped, rule_of
    from gigatok_ds.kernels.dropout_triton import drop

    samples, rule = torch.tensor([3, 2**33 + 1, 70, 2**62 - 5]), torch.tensor(rule_of(2**31 + 9, 0.3),
                                                                              dtype=torch.int32)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape, full in (((5, 4, 40), False), ((5, 4, 40), True), ((1, 4, 2050), False), ((3, 4, 1), False)):
            x = values(*shape, dtype=dtype)
            found, expected = drop(x, samples, rule, 9, 11, full), dropped(x, samples, rule, 9, 11, full)
            assert torch.equal(found == 0, expected == 0), (dtype, shape, full)
            close(found, expected, 0)


def cross_entropy():
    from gigatok_ds.kernels import cross_entropy_triton as kernel
    from gigatok_ds.parallel.cross_entropy import become_gradient_, totals_and_picked

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for vocabulary in (96, kernel.COLUMNS + 5):
            logits = (4 * values(4, vocabulary)).to(dtype)
            logits[1] += 60  # exponentials of it alone would be infinite in half precision
            targets = torch.tensor([0, vocabulary - 1, -3, vocabulary])  # the last two are other ranks'
            for found, expected in zip(kernel.totals_and_picked(logits, targets), totals_and_picked(logits, targets),
                                       strict=True):
                close(found, expected, 1e-6)
            totals, upstream = totals_and_picked(logits, targets)[0], torch.tensor([1.0, -0.5, 0.0, 1024.0])
            found, expected = logits.clone(), logits.clone()
            kernel.become_gradient_(found, targets, totals, upstream)
            become_gradient_(expected, targets, totals, upstream)
            close(found.float(), expected.float(),
                  2**-7 if dtype == torch.bfloat16 else 2**-10 if dtype == torch.float16 else 2e-6)
    logits[0, 7] = float("nan")
    assert kernel.totals_and_picked(logits, targets)[0].isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("kernel", [dropout, cross_entropy])
def test_kernels_compute_their_formulas(kernel):
    """In a process of its own, as Triton is told to interpret before it is imported."""
    pytest.importorskip("triton")
    subprocess.run([sys.executable, "-c", "import test_triton_kernels; "
                                          f"test_triton_kernels.{kernel.__name__}()"], cwd=HERE,
                   env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, timeout=300)


COMPILED = [
    ("dropout_triton", "drop_kernel",
     {"x": "*bf16", "out": "*bf16", "samples": "*i64", "rule": "*i32",
      **dict.fromkeys(("count", "batch", "width", "token", "feature"), "i32")},
      {"PER_SAMPLE": False, "ROWS": 2, "COLUMNS": 1024}, 4),
    ("cross_entropy_triton", "totals_kernel",
     {"logits": "*bf16", "targets": "*i64", "totals": "*fp32", "picked": "*fp32", "vocabulary": "i32"},
     {"COLUMNS": 4096}, 8),
    ("cross_entropy_triton", "gradient_kernel",
     {"logits": "*bf16", "targets": "*i64", "totals": "*fp32", "gradient": "*fp32", "vocabulary": "i32"},
     {"COLUMNS": 4096}, 8),
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
@pytest.mark.parametrize("module, name, arguments, constants, warps", COMPILED, ids=[case[1] for case in COMPILED])
def test_kernels_compile_for_gpus(module, name, arguments, constants, warps, capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"gigatok_ds.kernels.{module}"), name)
    source = ASTSource(kernel, arguments | dict.fromkeys(constants, "constexpr"), constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    assert compiled.asm["cubin"]
    assert ".local" not in compiled.asm["ptx"], "not everything is in registers"
