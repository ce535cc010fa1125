"""Compiled blocks train like eager ones, under ZeRO and with activations recomputed; who cannot compile is told so."""

import pytest
import torch
from layout_runs import Layout, LayoutRuns, largest_differences
from small_models import small_gpt, small_tokenizer

from gigatok_ds import InputError
from gigatok_ds.config.load import load_recipe
from gigatok_ds.models.attention import TransformerLayer
from gigatok_ds.models.cnn_blocks import ResidualBlock
from gigatok_ds.training import compile as compiling

CPU = torch.device("cpu")
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


@pytest.mark.parametrize("stage, kinds", [(0, {TransformerLayer, ResidualBlock}), (3, {TransformerLayer})])
def test_blocks_are_compiled_one_by_one_and_for_fixed_shapes(recorded, stage, kinds):
    network = small_tokenizer()
    blocks = compiling.compile_(network, "default", CPU, stage=stage)
    assert {type(block) for block in blocks} == kinds
    assert [function.__self__ for function, _ in recorded] == blocks
    assert all(options == {"mode": "default", "dynamic": False} for _, options in recorded)


def test_without_a_compiler_there_is_one_clear_line(recorded, monkeypatch):
    monkeypatch.setattr(compiling.build, "compiler", lambda: None)
    with pytest.raises(InputError, match="training.compile is default.*C\\+\\+ compiler.*training.compile=none"):
        compiling.compile_(small_gpt(), "default", CPU, stage=1)
    assert not recorded


def test_cut_layers_are_refused():
    with pytest.raises(InputError, match="training.compile is default.*parallel.tensor is 2"):
        load_recipe("GPT-B", ["training.compile=default", "parallel.tensor=2"])


@pytest.mark.parametrize("kind, layout", [
    pytest.param("tokenizer", Layout(stage=1), marks=pytest.mark.slow),
    pytest.param("tokenizer", Layout(stage=3, recompute=True), marks=pytest.mark.slow),
    pytest.param("gpt", Layout(stage=1), marks=pytest.mark.slow),
    pytest.param("gpt", Layout(stage=3), marks=pytest.mark.slow),
], ids=str)
def test_compiled_training_is_that_of_eager_blocks(runs, kind, layout):
    """Ten steps, the tokenizer's with every loss on and the GPT's with dropout. Slow ones compile for minutes."""
    compiled = runs.result(kind, layout, "training.compile=default")
    losses, norms, weights = largest_differences(compiled, runs.result(kind, layout))
    assert losses < TOLERANCE and norms < TOLERANCE and weights < TOLERANCE, (losses, norms, weights)
