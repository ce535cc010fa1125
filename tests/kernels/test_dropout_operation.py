"""Dropout as one operation: its masks by every way of computing it, and what it costs. test_triton_kernels.py has the
kernel.
"""

import pytest
import torch
from operation_costs import Costs

from gigatok_ds.cluster.share import Share
from gigatok_ds.kernels.addressed_dropout import addressed_dropout
from gigatok_ds.kernels.dropout_mask import dropped, rule_of
from gigatok_ds.parallel.dropout import Dropout, DropPath, dropout_at, name_dropouts

SAMPLES = torch.tensor([3, 2**33 + 1, 70, 2**62 - 5])
RULE = torch.tensor(rule_of(2**31 + 9, 0.3), dtype=torch.int32)


def values(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("full", [False, True])
def test_the_operator_drops_alike_forward_and_backward(full):
    x = values(5, 4, 24).requires_grad_()
    result = addressed_dropout(x, SAMPLES, RULE, 9, 11, full)
    assert torch.equal(result, dropped(x, SAMPLES, RULE, 9, 11, full)) and 0 < (result == 0).float().mean() < 1
    upstream = values(4, 24, 5).permute(2, 0, 1)  # not contiguous
    found, = torch.autograd.grad(result, x, upstream)
    assert torch.equal(found, dropped(upstream, SAMPLES, RULE, 9, 11, full))
    torch.library.opcheck(torch.ops.gigatok.addressed_dropout.default, (x, SAMPLES, RULE, 9, 11, full))


@pytest.mark.parametrize("kind", [Dropout, DropPath])
def test_without_a_compiler_it_is_one_operation_of_four_bytes_a_value(kind):
    """On tensors without storage, which take the way of GPUs; in bf16, forward and backward alike."""
    module = kind(0.1)
    name_dropouts(module)
    x = torch.empty((256, 32, 768), dtype=torch.bfloat16, device="meta", requires_grad=True)
    with dropout_at(0, torch.empty(32, dtype=torch.int64, device="meta")):
        with Costs() as forward:
            result = module(x)
        upstream = torch.empty_like(result)
        with Costs() as backward:
            result.backward(upstream)
    for counted in (forward, backward):
        assert counted.operations == ["gigatok.addressed_dropout.default"]
        assert counted.bytes <= 5 * x.numel()


def test_compiled_it_drops_alike_and_layers_share_what_is_compiled():
    """Of parts, and with probabilities that differ from layer to layer. test_compile.py has Inductor's own code."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    network = torch.nn.Sequential(*(Dropout(0.1 * number, features=Share(rank=1, size=2)) for number in range(1, 5)))
    name_dropouts(network)
    x = values(7, 4, 40)
    with dropout_at(3, SAMPLES):
        expected = [layer(x) for layer in network]
        compiled = [torch.compile(layer.forward, backend=counter, fullgraph=True, dynamic=False)(x) for layer
                    in network]
    assert all(map(torch.equal, compiled, expected)) and counter.frame_count == 1
    with dropout_at(4, SAMPLES + 1):
        again = torch.compile(network[0].forward, backend=counter, fullgraph=True, dynamic=False)(x)
        assert torch.equal(again, network[0](x)) and not torch.equal(again, expected[0])
    assert counter.frame_count == 1
