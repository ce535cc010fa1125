"""Parts of a model that stay as they are: on every layout, in every precision, when resumed and when exported."""

import shutil

import pytest
import torch
from layout_runs import Layout, LayoutRuns, largest_differences, train_on_a_rank
from rank_runs import run_ranks
from saved_models import save_models
from saved_runs import read_weights
from small_models import small_gpt, small_tokenizer
from training_runs import partitioning

from gigatok_ds.checkpoint.fragments import SavedEngine
from gigatok_ds.checkpoint.standalone import load_tokenizer
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.model import ENCODING_PARTS, GPTConfig
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.dry_run import shapes_of
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.monitoring.flops import GPTFlops
from gigatok_ds.planning.rank_memory import memory_of
from gigatok_ds.training.run import freezing_note

ENCODER = f"training.freeze=[{', '.join(ENCODING_PARTS)}]"
FROZEN = {"tokenizer": ENCODER, "gpt": "training.freeze=[tok_embeddings, positional_embedding]"}
MODELS = {"tokenizer": Tokenizer, "gpt": GPT}
STEPS = ["training.steps=4", "checkpoint.every=2", "training.validate_every=2", "training.ema_decay=0.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("layouts"))


def is_frozen(recipe, name):
    return name.partition(".")[0] in recipe.training.freeze


@pytest.mark.parametrize("kind, layout", [
    pytest.param("tokenizer", Layout(tensor=2, data=2, stage=3, sequence=True, recompute=True), marks=pytest.mark.slow),
    pytest.param("gpt", Layout(tensor=2, data=2, stage=3, recompute=True), marks=pytest.mark.slow),
    ("gpt", Layout(tensor=1, data=2, stage=2)),
], ids=str)
def test_layouts_train_like_a_single_process(runs, kind, layout):
    alone = runs.result(kind, Layout(), FROZEN[kind])
    assert max(largest_differences(runs.result(kind, layout, FROZEN[kind]), alone)) < 1e-5
    recipe = runs.recipe(kind, Layout(), FROZEN[kind])
    start = initialise_(MODELS[kind](recipe.model), recipe.training.seed)
    moved = {name for name, parameter in start.named_parameters() if not torch.equal(alone[1][name], parameter)}
    assert not any(is_frozen(recipe, name) for name in moved)
    assert {name.partition(".")[0] for name in moved} == set(recipe.model.parts) - set(recipe.training.freeze)


@pytest.mark.slow
@pytest.mark.parametrize("kind, frozen, more", [
    ("gpt", "training.freeze=[cls_embedding, tok_embeddings, positional_embedding]", []),
    ("tokenizer", ENCODER, ["loss.auxiliary=null"]),
], ids=["gpt", "tokenizer"])
def test_compiled_blocks_behind_frozen_parts_train_at_zero_3(runs, kind, frozen, more):
    """Nobody wants a gradient of their inputs, at which DeepSpeed would reduce those of the blocks."""
    layout = Layout(data=2, stage=3)
    compiled = runs.result(kind, layout, frozen, *more, "training.compile=default", quickly=True)
    assert max(largest_differences(compiled, runs.result(kind, layout, frozen, *more))) < 1e-4


def train(recipe, out, layout):
    run_ranks(train_on_a_rank, layout.tensor * layout.data, recipe, out, partitioning(layout.stage), timeout=900)


def encode(path, images):
    return load_tokenizer(path).encode(images)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "other"), [
    (Layout(data=2, stage=2), Layout(tensor=2, stage=1)), (Layout(data=2, stage=3), Layout(stage=2)),
], ids=str)
def test_in_bf16_a_frozen_encoder_gives_the_same_codes_to_the_last_bit(runs, tmp_path, layout, other):
    """Weights of float32 that bfloat16 does not hold: they are computed with, but not saved, as bfloat16."""
    recipe = runs.recipe("tokenizer", Layout(), *STEPS, ENCODER, "training.precision=bf16")
    torch.manual_seed(7)
    source = initialise_(Tokenizer(recipe.model), 5)
    save_models(tmp_path, source=source)
    out = tmp_path / "run"
    assert main(["convert", str(tmp_path / "source"), str(out), "--to", "training", "--recipe",
                 str(runs.folder / "tokenizer.yaml"), *recipe_arguments(runs, "training.precision=bf16", ENCODER)]) == 0
    train(load_recipe(out / "recipe.yaml"), out, layout)
    resumed = shutil.copytree(out, tmp_path / "resumed")
    shutil.rmtree(resumed / "checkpoints/step-0000004")
    train(load_recipe(resumed / "recipe.yaml", [f"parallel.tensor={other.tensor}"]), resumed, other)
    images = torch.rand(16, 3, 16, 16) * 2 - 1
    for run in (out, resumed):
        saved = read_weights(run / "checkpoints/step-0000004/generator")
        for name, value in source.state_dict().items():
            if name.partition(".")[0] in ENCODING_PARTS and "codebook_used" not in name:
                assert saved[name].dtype == torch.float32 and torch.equal(saved[name], value), name
        assert main(["convert", str(run), str(tmp_path / f"export-{run.name}")]) == 0
        assert torch.equal(encode(tmp_path / f"export-{run.name}", images), encode(tmp_path / "source", images))


def recipe_arguments(runs, *more):
    from layout_runs import OVERRIDES

    return [*OVERRIDES["tokenizer"], *runs.data["tokenizer"], *STEPS, *more]


def test_what_was_frozen_is_trained_again_from_the_weights_only(runs, tmp_path):
    frozen, thawed = (runs.recipe("gpt", Layout(), *STEPS, *more) for more in ([FROZEN["gpt"]], []))
    train(frozen, tmp_path / "frozen", Layout(stage=1))
    saved = SavedEngine(tmp_path / "frozen/checkpoints/step-0000004/gpt")
    assert "tok_embeddings.weight" in saved.full_names() and "tok_embeddings.weight" not in saved.layout.parameters
    branch = tmp_path / "frozen/checkpoints/step-0000002"
    arguments = [str(runs.folder / "gpt.yaml"), *overrides(runs, "gpt"), "--out", str(tmp_path / "branch"),
                 "--branch-from", str(branch)]
    assert main(["train", *arguments]) == 2
    assert main(["convert", str(tmp_path / "frozen"), str(tmp_path / "thawed"), "--to", "training", "--recipe",
                 str(runs.folder / "gpt.yaml"), *overrides(runs, "gpt")]) == 0
    train(load_recipe(tmp_path / "thawed/recipe.yaml"), tmp_path / "thawed", Layout(stage=1))
    after = read_weights(tmp_path / "thawed/checkpoints/step-0000004/gpt")
    assert not torch.equal(after["tok_embeddings.weight"], saved.read_full("tok_embeddings.weight"))
    assert thawed.training.freeze == ()


def overrides(runs, kind):
    from layout_runs import OVERRIDES

    return [*OVERRIDES[kind], *runs.data[kind], *STEPS]


@pytest.mark.parametrize(("parts", "said"), [
    (ENCODING_PARTS, "so they stay what they are"),
    (("encoder", "quantizer"), "also depend on cnn_encoder, quant_conv"),
    (("decoder",), None), ((), None)])
def test_what_becomes_of_codes_is_said(runs, parts, said):
    note = freezing_note(runs.recipe("tokenizer", Layout(), f"training.freeze=[{', '.join(parts)}]"))
    assert note is None if said is None else said in note
    assert freezing_note(runs.recipe("gpt", Layout(), FROZEN["gpt"])) is None


def test_frozen_parts_have_no_dropout_and_the_quantizer_stays_lenient():
    from gigatok_ds.models.tuning import freeze_

    model = small_tokenizer()
    freeze_(model, ENCODING_PARTS)
    model.eval().train()
    assert not any(module.training for part in ("cnn_encoder", "encoder") for module in
                   getattr(model, part).modules())
    assert model.quantizer.training and model.decoder.training and all(m.training for m in model.decoder.modules())


def test_parts_are_the_models_own():
    model = small_tokenizer()
    assert set(model.config.parts) == {name.partition(".")[0] for name, _ in model.named_parameters()}
    for changes in ({}, {"positions": "rope_2d"}, {"conditioning": "adaln"}, {"conditioning": "simple_adaln"}):
        gpt = small_gpt(sequence_length=16, **changes)
        assert set(gpt.config.parts) == {name.partition(".")[0] for name, _ in gpt.named_parameters()}, changes
    assert isinstance(gpt.config, GPTConfig)


@pytest.mark.parametrize(("kind", "setting", "said"), [
    ("tokenizer", "[encoders]", "has 'encoders'; parts of this model are cnn_encoder, encoder, quant_conv"),
    ("gpt", "[cls_embedding, tok_embeddings, positional_embedding, layers, norm, output]", "nothing to train"),
    ("tokenizer", "[cnn_decoder]", "adaptive_weight compares gradients at"),
])
def test_what_cannot_be_frozen_is_refused(runs, kind, setting, said):
    with pytest.raises(InputError, match=said):
        runs.recipe(kind, Layout(), f"training.freeze={setting}")


def test_plans_and_operations_follow(runs):
    """Of a tokenizer whose encoder is frozen, and of a GPT without its layers."""
    memory, flops = {}, {}
    for more in ([], [ENCODER]):
        recipe = runs.recipe("tokenizer", Layout(), "loss.semantic=null", "model.semantic_head=null",
                             "loss.perceptual=null", *more)
        shapes, micro = shapes_of(recipe), rehearse(recipe, 8, 5)
        memory[len(more)] = memory_of(recipe, shapes, micro.kept, zero={"stage": 2}, data_ranks=2)
        flops[len(more)] = micro.flops
    assert memory[1].states["generator"].moments < 0.65 * memory[0].states["generator"].moments
    assert memory[1].states["generator"].parameters == memory[0].states["generator"].parameters
    assert memory[1].activations < memory[0].activations and flops[1] < flops[0]
    whole, less = (GPTFlops(runs.recipe("gpt", Layout(), *more)).of_step(1).model
                   for more in ([], ["training.freeze=[layers, tok_embeddings, cls_embedding, positional_embedding]"]))
    assert less < 0.5 * whole
