"""Compiled blocks train like eager ones, on every kind of layout; who cannot compile is told so."""

import re

import pytest
import torch
from layout_runs import Layout, LayoutRuns, largest_differences
from small_models import small_gpt, small_tokenizer

from gigatok_ds import InputError
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.model import TransformerSize
from gigatok_ds.engine import compilation as compiling
from gigatok_ds.models.attention import TransformerLayer
from gigatok_ds.models.cnn_blocks import ResidualBlock
from gigatok_ds.models.gpt import Block
from gigatok_ds.parallel.dropout import dropout_at, name_dropouts
from gigatok_ds.parallel.layers import PLAIN

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("compile"))


@pytest.fixture
def recorded(monkeypatch):
    """What torch.compile is asked to compile, which is then left as it is."""
    found = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: found.append((function, options)) or function)
    return found


@pytest.mark.parametrize("stage, twice, eager",
                         [(0, "cnn_decoder", None), (3, None, None), (3, "cnn_decoder", "cnn_decoder")])
def test_blocks_are_compiled_one_by_one_and_for_fixed_shapes(recorded, stage, twice, eager):
    """All of them; at ZeRO-3 without those of the part that is called twice."""
    network = small_tokenizer()
    blocks = compiling.compile_(network, "default", CPU, stage=stage, twice=twice)
    left = set(network.get_submodule(eager).modules()) if eager else set()
    assert set(blocks) == {module for module in network.modules()
                           if isinstance(module, TransformerLayer | ResidualBlock)} - left
    assert {type(block) for block in blocks} == {TransformerLayer, ResidualBlock}
    assert [function.__self__ for function, _ in recorded] == blocks
    assert all(options == {"mode": "default", "dynamic": False} for _, options in recorded)


def test_without_a_compiler_there_is_one_clear_line(recorded, monkeypatch):
    monkeypatch.setattr(compiling.build, "compiler", lambda: None)
    with pytest.raises(InputError, match=r"training.compile is default.*C\+\+ compiler.*training.compile=none"):
        compiling.compile_(small_gpt(), "default", CPU, stage=1)
    assert not recorded


def test_auto_is_the_default_and_compiles_on_gpus_only(monkeypatch):
    assert load_recipe("GPT-B", []).training.compile == load_recipe("VQ_SS256", []).training.compile == "auto"
    monkeypatch.setattr(compiling, "missing", lambda device: None)
    settings = {"zero_optimization": {"stage": 1}}
    assert compiling.compile_of("auto", CPU, settings) is None
    assert compiling.compile_of("auto", CUDA, settings).keywords["mode"] == "default"
    assert compiling.compile_of("none", CUDA, settings) is None
    monkeypatch.setattr(compiling, "missing", lambda device: "Triton for this GPU")
    assert compiling.compile_of("auto", CUDA, settings) is None


def test_what_stays_eager_is_told(monkeypatch):
    """In a line, to whoever would expect it compiled: on CPUs nobody does."""
    tokenizer, gpt = load_recipe("VQ_SS256", []), load_recipe("GPT-B", ["parallel.tensor=2"])
    plain = load_recipe("VQ_SS256", ["loss.auxiliary=null"])
    zero2, zero3 = ({"zero_optimization": {"stage": stage}} for stage in (2, 3))
    monkeypatch.setattr(compiling, "missing", lambda device: None)
    line, = compiling.left_eager(tokenizer, CUDA, zero3)
    assert "CNN decoder" in line and "ZeRO" in line
    for recipe, device, settings in ((tokenizer, CUDA, zero2), (tokenizer, CPU, zero3), (plain, CUDA, zero3),
                                     (gpt, CUDA, zero3)):
        assert compiling.left_eager(recipe, device, settings) == []
    monkeypatch.setattr(compiling, "missing", lambda device: "Triton for this GPU")
    assert compiling.left_eager(gpt, CUDA, zero2) == ["training.compile is auto, but there is no Triton for this GPU: "
                                                      "nothing is compiled"]


def test_blocks_are_one_graph_that_all_layers_share():
    """With dropout and paths that are dropped at a rate of each layer's own; over steps of other samples, too."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    network = small_gpt(size=TransformerSize(width=32, layers=5, heads=2), drop_path=0.4, qk_norm=True,
                        sequence_length=9, positions="rope_2d").train()
    name_dropouts(network)
    codes = torch.arange(18).view(2, 9) % 64

    def gradients(samples):
        network.zero_grad()
        with dropout_at(7, samples):
            network(codes[:, :-1], torch.tensor([0, 1]), codes).mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    eager = [gradients(torch.tensor([3, 4]) + step) for step in range(2)]
    for block in network.layers:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    for step in range(2):
        for found, expected in zip(gradients(torch.tensor([3, 4]) + step), eager[step], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert counter.frame_count == 2, "of the first layer, which has no path to drop, and of all others"


@pytest.mark.slow
def test_a_compiled_gpt_block_is_few_kernels_beside_its_products():
    """GPT-B's, with dropout, in bf16, by the code that Inductor generates for CPUs. As operations each it is 52 and 67.
    """
    from torch._inductor.utils import run_and_get_code

    block = Block(load_recipe("GPT-B", []).model, PLAIN, 0).train().bfloat16()
    name_dropouts(block)
    forward = torch.compile(block.forward, fullgraph=True, dynamic=False)
    x = torch.randn(64, 2, 768, dtype=torch.bfloat16, requires_grad=True)
    with dropout_at(0, torch.arange(2)):
        _, codes = run_and_get_code(lambda: forward(x).sum().backward())
    fused, products = ([len(re.findall(pattern, code, re.MULTILINE)) for code in codes]
                       for pattern in (r"^ +cpp_fused\w*\(", r"^ +extern_kernels\.mm\("))
    assert products == [5, 10]
    assert fused[0] <= 4 and fused[1] <= 7


# Quick ones trace and differentiate, which is where DeepSpeed, Megatron and recomputation could get in the way, and
# generate nothing.
QUICK = [
    ("gpt", Layout(tensor=2, stage=3, sequence=True, recompute=True)),
    pytest.param("gpt", Layout(tensor=2, stage=1), marks=pytest.mark.slow),
    pytest.param("gpt", Layout(tensor=2, data=2, stage=2, sequence=True), marks=pytest.mark.slow),
    pytest.param("tokenizer", Layout(data=2, stage=2, recompute=True), marks=pytest.mark.slow),
    pytest.param("tokenizer", Layout(tensor=2, stage=0, sequence=True), marks=pytest.mark.slow),
    pytest.param("tokenizer", Layout(tensor=2, stage=3, recompute=True), marks=pytest.mark.slow),
]


def assert_like_eager(runs, kind, layout, *more, quickly):
    compiled = runs.result(kind, layout, *more, "training.compile=default", quickly=quickly)
    losses, norms, weights = largest_differences(compiled, runs.result(kind, layout, *more))
    assert losses < TOLERANCE and norms < TOLERANCE and weights < TOLERANCE, (losses, norms, weights)


@pytest.mark.parametrize("kind, layout", QUICK, ids=str)
def test_traced_training_is_that_of_eager_blocks(runs, kind, layout):
    """Ten steps, the tokenizer's with every loss on and the GPT's with dropout."""
    assert_like_eager(runs, kind, layout, quickly=True)


@pytest.mark.slow
def test_zero_3_takes_residual_blocks_that_are_called_once(runs):
    assert_like_eager(runs, "tokenizer", Layout(data=2, stage=3), "loss.auxiliary=null", quickly=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind, layout", [
    ("tokenizer", Layout(stage=1)),
    ("tokenizer", Layout(stage=3, recompute=True)),
    ("gpt", Layout(stage=1)),
    ("gpt", Layout(stage=3)),
    ("gpt", Layout(tensor=2, stage=3, sequence=True, recompute=True)),
], ids=str)
def test_compiled_training_is_that_of_eager_blocks(runs, kind, layout):
    """With the code that Inductor generates, whose compilation takes minutes."""
    assert_like_eager(runs, kind, layout, quickly=False)
