"""Fine-tuning: a run that starts from a standalone model's weights, at any layout."""

import pytest
import torch
from layout_runs import Layout, LayoutRuns, train_on_a_rank
from rank_runs import run_ranks
from saved_runs import read_weights

from gigatok_ds.checkpoint.fragments import SavedEngine
from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.training import warm_start
from gigatok_ds.training.warm_start import write_start_point

MORE = ["training.steps=2", "checkpoint.every=2", "training.validate_every=2", "training.ema_decay=0.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("start"))


def start(runs, kind, out, layout, *more, seed=5):
    """A run directory that starts from weights of another seed; returns the recipe and those weights."""
    recipe = runs.recipe(kind, layout, *MORE, *more)
    weights = initialise_((GPT if kind == "gpt" else Tokenizer)(recipe.model), seed).state_dict()
    write_start_point(recipe, weights, out)
    return recipe, weights


@pytest.mark.parametrize("kind", ["gpt", pytest.param("tokenizer", marks=pytest.mark.slow)])
def test_every_layout_trains_from_it_alike(runs, kind, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "FILE_BYTES", 10_000)
    losses = {}
    for layout in (Layout(stage=1), Layout(tensor=2, data=2, stage=3)):
        out = tmp_path / str(layout)
        _recipe, weights = start(runs, kind, out, layout)
        part = "gpt" if kind == "gpt" else "generator"
        started = read_weights(out / "checkpoints" / "step-0000000" / part)
        assert all(torch.equal(started[name], value)
                   for name, value in weights.items()) and started.keys() == weights.keys()
        assert SavedEngine(out / "checkpoints" / "step-0000000" / part).layout.data_size > 3
        run_ranks(train_on_a_rank, layout.tensor * layout.data, load_recipe(out / "recipe.yaml"), out,
                  zero_settings(layout.stage))
        losses[layout] = [line["loss"] for line in read_metrics(out) if "loss" in line]
    one, other = losses.values()
    assert len(one) == 2 and one == pytest.approx(other, rel=1e-5)
    # Of a GPT, the first loss is that of zero logits.
    assert one[1] != runs.result(kind, Layout())[0][1]["loss"], "a new run starts elsewhere"


def test_parts_start_anew_on_request(runs, tmp_path):
    recipe = runs.recipe("gpt", Layout(), *MORE)
    other = load_recipe(runs.folder / "gpt.yaml", ["model.size={width: 32, layers: 2, heads: 4}", "model.qk_norm=true",
                                                   "model.num_classes=7"])
    weights = initialise_(GPT(other.model), 5).state_dict()
    with pytest.raises(InputError, match=r"cls_embedding.*is \[8, 32\].*and \[6, 32\].*--fresh cls_embedding"):
        write_start_point(recipe, weights, tmp_path / "run")
    assert not list(tmp_path.iterdir()), "nothing half-made"
    write_start_point(recipe, weights, tmp_path / "run", fresh=["cls_embedding"])
    started = read_weights(tmp_path / "run" / "checkpoints" / "step-0000000" / "gpt")
    new = initialise_(GPT(recipe.model), recipe.training.seed).state_dict()
    for name, value in started.items():
        assert torch.equal(value, new[name] if name.startswith("cls_embedding") else weights[name]), name


def test_what_does_not_fit_is_refused(runs, tmp_path):
    recipe = runs.recipe("gpt", Layout(), *MORE)
    weights = initialise_(GPT(recipe.model), 5).state_dict()
    with pytest.raises(InputError, match="--fresh nonsense names no parameter"):
        write_start_point(recipe, weights, tmp_path / "run", fresh=["nonsense"])
    del weights["norm.weight"]
    with pytest.raises(InputError, match=r"lack norm.weight"):
        write_start_point(recipe, weights, tmp_path / "run")
    (tmp_path / "run").mkdir()
    with pytest.raises(InputError, match="exists already"):
        write_start_point(recipe, weights, tmp_path / "run")
    assert set(build_on_meta(recipe.model).state_dict()) - weights.keys() == {"norm.weight"}


SIZES = {
    "tokenizer": (["model.image_size=32", "model.latent_tokens=32"], {
        "encoder.positional_embedding": "8 x 8 positions become 16 x 16, bicubically",
        "decoder.positional_embedding": "8 x 8 positions become 16 x 16, bicubically",
        "decoder.q_2d": "8 x 8 positions become 16 x 16, bicubically",
        "encoder.latent_token_positional_embedding": "8 latent tokens become 32: finer levels are interpolated",
        "decoder.latent_token_positional_embedding": "8 latent tokens become 32: finer levels are interpolated"}),
    "gpt": (["model.sequence_length=32"], {
        "positional_embedding": "8 latent tokens become 32: finer levels are interpolated"}),
}


@pytest.mark.parametrize("kind", SIZES)
def test_a_model_goes_on_at_another_size(runs, kind, tmp_path, caplog):
    """Said line by line; all else is carried over bit for bit."""
    settings, said = SIZES[kind]
    before, after = runs.recipe(kind, Layout(), *MORE), runs.recipe(kind, Layout(), *MORE, *settings)
    weights = initialise_((GPT if kind == "gpt" else Tokenizer)(before.model), 5).state_dict()
    caplog.set_level("INFO", "gigatok_ds")
    write_start_point(after, weights, tmp_path / "run")
    for name, how in said.items():
        assert any(line.startswith(f"{name}: {how}") for line in caplog.messages), caplog.messages
    assert len(caplog.messages) == len(said)
    part = "gpt" if kind == "gpt" else "generator"
    started = read_weights(tmp_path / "run" / "checkpoints" / "step-0000000" / part)
    assert {name for name, value in started.items() if not torch.equal(value, weights[name])} == set(said)
    fresh = next(iter(said))
    write_start_point(after, weights, tmp_path / "fresh", fresh=[fresh])
    assert not any(line.startswith(fresh) for line in caplog.messages[len(said):])
