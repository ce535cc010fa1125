"""Dropout as one operation: its masks by every way of computing it, what it costs, and that GPUs can be compiled for."""

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gigatok_ds.parallel.dropout import DropPath, Dropout, Part, dropout_at, name_dropouts
from gigatok_ds.parallel.dropout_mask import addressed_dropout, dropped, rule_of

SAMPLES = torch.tensor([3, 2**33 + 1, 70, 2**62 - 5])
RULE = torch.tensor(rule_of(2**31 + 9, 0.3), dtype=torch.int32)


def values(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("whole", [False, True])
def test_the_operator_drops_alike_forward_and_backward(whole):
    x = values(5, 4, 24).requires_grad_()
    result = addressed_dropout(x, SAMPLES, RULE, 9, 11, whole)
    assert torch.equal(result, dropped(x, SAMPLES, RULE, 9, 11, whole)) and 0 < (result == 0).float().mean() < 1
    upstream = values(4, 24, 5).permute(2, 0, 1)  # not contiguous
    found, = torch.autograd.grad(result, x, upstream)
    assert torch.equal(found, dropped(upstream, SAMPLES, RULE, 9, 11, whole))
    torch.library.opcheck(torch.ops.gigatok.addressed_dropout.default, (x, SAMPLES, RULE, 9, 11, whole))


class Counted(TorchDispatchMode):
    """Operations that are more than a view, and the bytes of tensors that they read and write."""

    def __init__(self):
        super().__init__()
        self.operations, self.bytes = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if not function.is_view:
            self.operations.append(function)
            self.bytes += sum(value.nbytes for value in (*args, result) if isinstance(value, torch.Tensor))
        return result


@pytest.mark.parametrize("kind", [Dropout, DropPath])
def test_without_a_compiler_it_is_one_operation_of_four_bytes_a_value(kind):
    """On tensors without storage, which take the way of GPUs; in bf16, forward and backward alike."""
    module = kind(0.1)
    name_dropouts(module)
    x = torch.empty((256, 32, 768), dtype=torch.bfloat16, device="meta", requires_grad=True)
    with dropout_at(0, torch.empty(32, dtype=torch.int64, device="meta")):
        with Counted() as forward:
            result = module(x)
        upstream = torch.empty_like(result)
        with Counted() as backward:
            result.backward(upstream)
    for counted in (forward, backward):
        assert [str(operation) for operation in counted.operations
                if operation is not torch.ops.aten.detach.default] == ["gigatok.addressed_dropout.default"]
        assert counted.bytes <= 5 * x.numel()


def test_compiled_it_drops_alike_and_layers_share_what_is_compiled():
    """Of parts, and with probabilities that differ from layer to layer. test_compile.py has Inductor's own code."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    network = torch.nn.Sequential(*(Dropout(0.1 * number, features=Part(rank=1, size=2)) for number in range(1, 5)))
    name_dropouts(network)
    x = values(7, 4, 40)
    with dropout_at(3, SAMPLES):
        expected = [layer(x) for layer in network]
        compiled = [torch.compile(layer.forward, backend=counter, fullgraph=True, dynamic=False)(x) for layer in network]
    assert all(map(torch.equal, compiled, expected)) and counter.frame_count == 1
    with dropout_at(4, SAMPLES + 1):
        again = torch.compile(network[0].forward, backend=counter, fullgraph=True, dynamic=False)(x)
        assert torch.equal(again, network[0](x)) and not torch.equal(again, expected[0])
    assert counter.frame_count == 1


def interpreted():
    """In a process of its own: the kernel by Triton's interpreter, beside the formula."""
    from gigatok_ds.parallel.dropout_kernel import drop

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for shape in ((5, 4, 40), (1, 4, 2050), (3, 4, 1)):
            for whole in (False, True):
                x = values(*shape, dtype=dtype)
                found, expected = drop(x, SAMPLES, RULE, 9, 11, whole), dropped(x, SAMPLES, RULE, 9, 11, whole)
                assert torch.equal(found == 0, expected == 0), (dtype, shape, whole)
                # The interpreter cuts what a GPU rounds to bf16.
                close = 2**-7 if dtype == torch.bfloat16 else 0
                torch.testing.assert_close(found, expected, rtol=close, atol=0)


def test_the_kernel_of_gpus_drops_alike_in_tritons_interpreter():
    pytest.importorskip("triton")
    folder = os.path.dirname(__file__)
    subprocess.run([sys.executable, "-c", "import test_dropout_operation; test_dropout_operation.interpreted()"], cwd=folder,
                   env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_for_gpus(capability):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gigatok_ds.parallel.dropout_kernel import drop_kernel

    numbers = dict.fromkeys(("count", "batch", "width", "token", "feature"), "i32")
    constants = {"WHOLE": False, "ROWS": 2, "COLUMNS": 1024}
    signature = {"x": "*bf16", "out": "*bf16", "samples": "*i64", "rule": "*i32", **numbers, **dict.fromkeys(constants, "constexpr")}
    compiled = triton.compile(ASTSource(drop_kernel, signature, constexprs=constants), target=GPUTarget("cuda", capability, 32))
    assert compiled.asm["cubin"] and "local.f" not in compiled.asm["ptx"], "registers are spilled"
