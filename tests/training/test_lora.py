"""Low-rank adapters: what they compute, on every layout, from given weights to an export without them."""

import dataclasses
import json
import shutil

import pytest
import torch
from layout_runs import OVERRIDES, STEPS, Layout, LayoutRuns, largest_differences, train_on_a_rank
from rank_runs import run_ranks
from saved_models import save_models
from saved_runs import read_ema, read_weights
from small_models import small_gpt
from torch.nn.functional import cross_entropy
from training_runs import partitioning

from gigatok_ds.checkpoint.fragments import SavedEngine
from gigatok_ds.checkpoint.inspection import inspect
from gigatok_ds.checkpoint.original import read_original
from gigatok_ds.checkpoint.standalone import lazy_weights, load_gpt, read_config
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.lora import LoRAConfig
from gigatok_ds.config.model import TransformerSize
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.dry_run import Rehearsal, shapes_of
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tuning import adapt_, is_adapters, tune_
from gigatok_ds.monitoring.flops import GPTFlops
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.planning.plan_cache import key_of
from gigatok_ds.planning.rank_memory import memory_of
from gigatok_ds.training.run_checks import check_start
from gigatok_ds.training.warm_start import write_start_point

LORA = "training.lora={rank: 4, alpha: 8, train: [cls_embedding]}"
NOTHING_ELSE = "training.lora={rank: 4, alpha: 8}"


def given(recipe):
    """Weights to start from, other than those of the recipe's seed; with a head that has opinions."""
    gpt = initialise_(GPT(recipe.model), 5)
    torch.nn.init.normal_(gpt.output.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return gpt


def begin(recipe, out):
    write_start_point(recipe, given(recipe).state_dict(), out)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("lora"), begin)


def adapted(lora, *, seed=3, **changes):
    """The small GPT with adapters none of whose weights is zero."""
    gpt = adapt_(small_gpt(**changes), lora)
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in gpt.named_parameters():
        if is_adapters(name):
            torch.nn.init.normal_(parameter, std=0.2, generator=draw)
    return gpt


def inputs(gpt):
    draw = torch.Generator().manual_seed(1)
    return (torch.randint(gpt.config.vocab_size, (3, gpt.config.sequence_length), generator=draw),
            torch.randint(gpt.config.num_classes, (3,), generator=draw))


def test_adapters_begin_as_the_model_itself_bit_for_bit():
    plain = small_gpt(qk_norm=True)
    gpt = initialise_(adapt_(small_gpt(qk_norm=True), LoRAConfig(rank=4, alpha=8)), seed=0)
    gpt.load_state_dict(plain.state_dict(), strict=False)
    codes, classes = inputs(plain)
    assert torch.equal(gpt(codes[:, :-1], classes), plain(codes[:, :-1], classes))
    ours = {name: value for name, value in gpt.named_parameters() if is_adapters(name)}
    assert len(ours) == 2 * 2 * 5
    for name, value in ours.items():
        if ".B." in name:
            assert not value.any()
        else:
            bound = value.shape[1] ** -0.5
            assert value.shape[0] == 4 and 0.9 * bound < value.abs().max() <= bound
    assert len({value[0, 0].item() for name, value in ours.items() if ".A." in name}) == 10, "drawn by name"
    again = initialise_(adapt_(small_gpt(qk_norm=True), LoRAConfig(rank=4, alpha=8)), seed=0)
    assert all(torch.equal(again.get_parameter(name), value) for name, value in ours.items())


@pytest.mark.parametrize("kind", ["attention", "ffn"])
def test_gradients_of_adapters_are_those_of_the_formula(kind):
    """dL/dB = s G (A X)^T and dL/dA = s B^T G X^T in float64, for inputs X and the gradient G of the output."""
    lora = LoRAConfig(rank=3, alpha=7, layers=(kind,))
    gpt, seen = adapted(lora).double(), {}
    projections = {name.partition(".lora")[0] for name, _ in gpt.named_parameters() if is_adapters(name)}
    assert len(projections) == 2 * {"attention": 2, "ffn": 3}[kind]

    def see(name, x, y):
        seen[name] = x.detach().flatten(0, 1), y
        y.retain_grad()

    for name in projections:
        gpt.get_submodule(name).register_forward_hook(lambda _, x, y, name=name: see(name, x[0], y))
    codes, classes = inputs(gpt)
    cross_entropy(gpt(codes[:, :-1], classes).flatten(0, 1), codes.flatten()).backward()
    for name, (x, y) in seen.items():
        owner, gradient, scale = gpt.get_submodule(name), y.grad.flatten(0, 1), 7 / 3
        into, out_of = owner.lora.A.weight, owner.lora.B.weight
        product = x @ owner.weight.t() + scale * (x @ into.t()) @ out_of.t()
        assert torch.allclose(product, y.flatten(0, 1), rtol=1e-12, atol=1e-13)
        for found, expected in ((out_of.grad, scale * gradient.t() @ (x @ into.t())),
                                (into.grad, scale * (gradient @ out_of).t() @ x)):
            assert expected.norm() > 1e-6 and (found - expected).norm() < 1e-12 * expected.norm()


def test_only_adapters_and_named_parts_are_trained(runs):
    recipe = runs.recipe("gpt", Layout(), LORA)
    gpt = tune_(GPT(recipe.model), recipe.training)
    trained = {name for name, parameter in gpt.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in gpt.named_parameters()
                       if is_adapters(name) or name.startswith("cls_embedding")}
    assert all(module.training for module in gpt.train().modules()), "dropout stays as the recipe has it"


REFUSED = {
    "rank": ("{rank: 0, alpha: 8}", r"training\.lora\.rank is 0; it must be at least 1"),
    "alpha": ("{rank: 4, alpha: 0}", r"alpha is 0.*must be above 0"),
    "no-alpha": ("{rank: 4}", r"training\.lora\.alpha is missing"),
    "unknown": ("{rank: 4, alpha: 8, dropout: 0.1}", r"unknown key training\.lora\.dropout"),
    "layers": ("{rank: 4, alpha: 8, layers: [attn]}", r"training\.lora\.layers\.0 is 'attn': .*'attention' or 'ffn'"),
    "no-layers": ("{rank: 4, alpha: 8, layers: []}", r"layers is empty.*name attention, ffn or both"),
    "twice": ("{rank: 4, alpha: 8, layers: [ffn, ffn]}", r"names a part twice"),
    "part": ("{rank: 4, alpha: 8, train: [cls]}", r"train has 'cls'; parts of this model are cls_embedding, tok_"),
    "whole-layers": ("{rank: 4, alpha: 8, train: [layers]}", r"'layers', whose projections the adapters stand for"),
    "no-such-part": ("{rank: 4, alpha: 8, train: [adaLN]}", r"train has 'adaLN'; parts of this model are"),
    "high-rank": ("{rank: 33, alpha: 8}", r"rank is 33, but projections of this model are only 32 wide"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_meant_is_refused(runs, name):
    setting, said = REFUSED[name]
    with pytest.raises(InputError, match=said):
        runs.recipe("gpt", Layout(), f"training.lora={setting}")


def test_combinations_that_cannot_be_meant_are_refused(runs, tmp_path):
    with pytest.raises(InputError, match=r"training\.freeze is \['norm'\], but with training\.lora all parts"):
        runs.recipe("gpt", Layout(), LORA, "training.freeze=[norm]")
    with pytest.raises(InputError, match="adapts GPTs, but this recipe is of a tokenizer"):
        runs.recipe("tokenizer", Layout(), LORA.replace(", train: [cls_embedding]", ""))
    recipe = runs.recipe("gpt", Layout(), LORA)
    with pytest.raises(InputError, match="holds no weights to start from; write them there with gigatok-ds convert"):
        check_start(recipe, tmp_path / "run", None)
    weights = given(recipe).state_dict()
    for prefix, said in (("norm", "add norm to training.lora.train"), ("layers.0.attention", "leave --fresh out")):
        with pytest.raises(InputError, match=f"--fresh {prefix} draws .* which training.lora would leave.*{said}"):
            write_start_point(recipe, weights, tmp_path / "run", fresh=[prefix])
    assert not list(tmp_path.iterdir())


def train(recipe, out, layout, quickly=False):
    run_ranks(train_on_a_rank, layout.tensor * layout.data, recipe, out, partitioning(layout.stage), quickly,
              timeout=900)


def assert_only_adapters_moved(recipe, weights):
    start = given(recipe).state_dict()
    for name, value in weights.items():
        if name in start and not name.startswith("cls_embedding"):
            assert value.dtype == torch.float32 and torch.equal(value, start[name]), name
        elif ".B." in name:
            assert value.any(), name
    assert not torch.equal(weights["cls_embedding.embedding_table.weight"],
                           start["cls_embedding.embedding_table.weight"])


@pytest.mark.parametrize("layout", [
    Layout(tensor=2, data=2, stage=3, sequence=True),
    Layout(tensor=2, data=1, stage=1),
    pytest.param(Layout(tensor=1, data=2, stage=2, recompute=True), marks=pytest.mark.slow),
    pytest.param(Layout(tensor=4, data=1, stage=0, sequence=True, recompute=True), marks=pytest.mark.slow),
    pytest.param(Layout(tensor=2, data=2, stage=0, accumulate=True), marks=pytest.mark.slow),
    pytest.param(Layout(tensor=1, data=4, stage=3, recompute=True), marks=pytest.mark.slow),
], ids=str)
def test_layouts_train_like_a_single_process(runs, layout):
    alone = runs.result("gpt", Layout(), LORA)
    found = runs.result("gpt", layout, LORA)
    assert max(largest_differences(found, alone)) < 1e-5
    for _, weights in (alone, found):
        assert_only_adapters_moved(runs.recipe("gpt", Layout(), LORA), weights)
    losses = [line["loss"] for line in alone[0] if "loss" in line]
    assert len(set(losses)) == STEPS


def test_blocks_with_adapters_are_one_graph():
    """That all layers share."""
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    gpt = adapted(LoRAConfig(rank=4, alpha=8), size=TransformerSize(width=32, layers=4, heads=2))
    codes, classes = inputs(gpt)
    eager = gpt(codes[:, :-1], classes)
    for block in gpt.layers:
        block.forward = torch.compile(block.forward, backend=counter, fullgraph=True, dynamic=False)
    torch.testing.assert_close(gpt(codes[:, :-1], classes), eager)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("setting", "layout"), [
    pytest.param(NOTHING_ELSE, Layout(stage=3), marks=pytest.mark.slow),
    pytest.param(LORA, Layout(tensor=2, data=1, stage=3, sequence=True, recompute=True), marks=pytest.mark.slow),
    pytest.param(LORA, Layout(data=2, stage=2), marks=pytest.mark.slow),
], ids=lambda value: {LORA: "and-classes", NOTHING_ELSE: "adapters"}.get(value, str(value)))
def test_compiled_training_is_that_of_eager_blocks(runs, setting, layout):
    """At ZeRO-3 the first block's input needs no gradient of its own, unless the embedding of classes is trained."""
    compiled = runs.result("gpt", layout, setting, "training.compile=default", quickly=True)
    assert max(largest_differences(compiled, runs.result("gpt", layout, setting))) < 1e-4


@pytest.mark.parametrize(("layout", "other"), [
    (Layout(stage=2), Layout(tensor=2, data=1, stage=3)),
    pytest.param(Layout(tensor=2, data=2, stage=3, sequence=True), Layout(tensor=1, data=2, stage=1),
                 marks=pytest.mark.slow),
    pytest.param(Layout(tensor=4, stage=1), Layout(data=2, stage=0), marks=pytest.mark.slow),
], ids=str)
def test_a_run_goes_on_at_another_layout(runs, tmp_path, layout, other):
    """From step 5, which an average of half the past is kept through."""
    middle = [LORA, "checkpoint.every=5", "training.ema_decay=0.5"]
    alone = runs.result("gpt", Layout(), *middle)
    recipe, out = runs.recipe("gpt", layout, *middle), tmp_path / "run"
    begin(recipe, out)
    train(recipe, out, layout)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:07d}")
    (out / "metrics.jsonl").unlink()
    train(runs.recipe("gpt", other, *middle), out, other)
    folder = out / "checkpoints" / f"step-{STEPS:07d}" / "gpt"
    found = read_metrics(out), read_weights(folder)
    assert max(largest_differences(found, ([line for line in alone[0] if line["step"] > 5], alone[1]))) < 1e-5
    assert_only_adapters_moved(recipe, found[1])
    assert read_ema(folder).keys() == set(SavedEngine(folder).layout.parameters)
    assert not torch.equal(*(values["layers.1.attention.wo.lora.B.weight"] for values in (read_ema(folder), found[1])))


def arguments(runs, *more):
    return ["--recipe", str(runs.folder / "gpt.yaml"), *OVERRIDES["gpt"], *runs.data["gpt"], *more]


@pytest.fixture(scope="module")
def tuned(runs, tmp_path_factory):
    """A standalone GPT, and a run that was started from it by the command line: for seven classes instead of five."""
    folder = tmp_path_factory.mktemp("tuned")
    source = given(runs.recipe("gpt", Layout()))
    save_models(folder, source=source)
    more = [LORA, "model.num_classes=7", "training.ema_decay=0.5"]
    assert main(["convert", str(folder / "source"), str(folder / "run"), "--to", "training",
                 *arguments(runs, *more), "--fresh", "cls_embedding"]) == 0
    recipe = load_recipe(folder / "run/recipe.yaml")
    shutil.copytree(folder / "run", folder / "begun")
    train(recipe, folder / "run", Layout(tensor=2, data=1, stage=1))
    return folder, source, recipe


def test_a_start_point_is_the_model_itself(tuned):
    folder, source, recipe = tuned
    weights = read_weights(folder / "begun/checkpoints/step-0000000/gpt")
    fresh = initialise_(adapt_(GPT(recipe.model), recipe.training.lora), recipe.training.seed).state_dict()
    assert weights.keys() == fresh.keys()
    for name, value in weights.items():
        anew = is_adapters(name) or name.startswith("cls_embedding")
        assert torch.equal(value, fresh[name] if anew else source.state_dict()[name]), name


def logits_in_training(folder, kind):
    """What the run's model gives with its adapters, and its inputs."""
    recipe = load_recipe(folder / "run/recipe.yaml")
    last = folder / "run/checkpoints" / f"step-{STEPS:07d}" / "gpt"
    gpt = adapt_(GPT(recipe.model), recipe.training.lora).eval()
    gpt.load_state_dict(read_weights(last) | (read_ema(last) if kind == "ema" else {}))
    codes, classes = inputs(gpt)
    return gpt(codes[:, :-1], classes), codes, classes


@pytest.mark.parametrize("kind", ["ema", "model"])
@torch.no_grad()
def test_an_export_is_a_plain_gpt_with_the_merged_weights(tuned, tmp_path, kind):
    folder, source, recipe = tuned
    out = tmp_path / "export"
    assert main(["convert", str(folder / "run"), str(out), "--weights", kind, "--verify"]) == 0
    expected, codes, classes = logits_in_training(folder, kind)
    gpt = load_gpt(out)
    assert gpt.config == recipe.model and gpt.config.num_classes == 7
    assert (gpt(codes[:, :-1], classes) - expected).abs().max() < 1e-5
    assert lazy_weights(out).shapes == {name: value.shape for name, value in GPT(recipe.model).state_dict().items()}
    config = read_config(out)
    assert config["provenance"].pop("lora") == json.loads(json.dumps(dataclasses.asdict(recipe.training.lora)))
    assert "lora" not in json.dumps(config)
    plain = source.state_dict()
    for name, value in lazy_weights(out).items():
        touched = name.startswith(("layers", "cls_embedding")) and "norm" not in name
        assert name.startswith("cls_embedding") or torch.equal(value, plain[name]) != touched, name
    original = tmp_path / "merged.pt"
    assert main(["convert", str(folder / "run"), str(original), "--to", "original", "--weights", kind]) == 0
    stored = read_original(original, kind="gpt")
    assert stored.keys() == gpt.state_dict().keys()
    assert all(torch.equal(stored[name], value) for name, value in gpt.state_dict().items())


def test_what_was_tuned_is_tuned_again(runs, tuned, tmp_path):
    """The merged weights are what the next run's adapters begin beside."""
    folder, _, recipe = tuned
    assert main(["convert", str(folder / "run"), str(tmp_path / "next"), "--to", "training", "--weights", "model",
                 *arguments(runs, NOTHING_ELSE, "model.num_classes=7", "training.validate_every=2")]) == 0
    again = load_recipe(tmp_path / "next/recipe.yaml")
    train(again, tmp_path / "next", Layout(stage=1))
    assert main(["convert", str(folder / "run"), str(tmp_path / "merged"), "--weights", "model"]) == 0
    merged, after = lazy_weights(tmp_path / "merged"), read_weights(
        tmp_path / "next/checkpoints" / f"step-{STEPS:07d}" / "gpt")
    assert all(torch.equal(after[name], value) for name, value in merged.items())
    validated = [line["validation/loss"] for line in read_metrics(tmp_path / "next") if "validation/loss" in line]
    assert len(validated) == STEPS // 2 and validated[-1] != validated[0]
    assert recipe.training.lora.train == ("cls_embedding",)


def test_runs_and_checkpoints_are_described(tuned, capsys):
    folder, _, recipe = tuned
    found = inspect(folder / "run", check=True)
    assert found["recipe"]["training"]["lora"]["rank"] == 4
    last = found["checkpoints"][-1]
    sizes = [parameter.numel() for parameter in tune_(GPT(recipe.model), recipe.training).parameters()
             if parameter.requires_grad]
    assert last["complete"] and not last["damaged"] and last["parts"]["gpt"]["parameters"] == sum(sizes)
    assert main(["inspect", str(folder / "run/checkpoints" / f"step-{STEPS:07d}")]) == 0
    assert f"parameters: {sum(sizes):,}" in capsys.readouterr().out


def test_other_adapters_are_another_run(runs, tuned):
    folder, _, _ = tuned
    with pytest.raises(InputError, match=r"training\.lora\.rank differ"):
        from gigatok_ds.training.run_checks import check_directory

        check_directory(load_recipe(folder / "run/recipe.yaml", ["training.lora.rank=8"]), folder / "run")


def test_plans_and_operations_follow(runs):
    """Moments and gradients of adapters alone; a forward pass, its gradients to inputs, and little more."""
    deep = "model.size={width: 64, layers: 5, heads: 4}"
    whole, less = (runs.recipe("gpt", Layout(), deep, *more) for more in ([], [NOTHING_ELSE]))
    shapes = shapes_of(less)
    gpt = tune_(GPT(less.model), less.training)
    assert sum(shapes.trained["gpt"]) == sum(p.numel() for p in gpt.parameters() if p.requires_grad)
    assert sum(shapes.frozen_parts["gpt"]) == sum(shapes_of(whole).trained["gpt"])
    memory = {recipe.training.lora is None: memory_of(recipe, shapes_of(recipe), rehearse(recipe, 8, 1).kept,
                                                      zero={"stage": 2}, data_ranks=2) for recipe in (whole, less)}
    assert memory[False].states["gpt"].moments < 0.2 * memory[True].states["gpt"].moments
    assert memory[False].activations < memory[True].activations
    flops = [GPTFlops(recipe).of_step(1).model for recipe in (whole, less)]
    assert 0.6 * flops[0] < flops[1] < 0.9 * flops[0]
    assert len({key_of(less), key_of(whole), key_of(runs.recipe("gpt", Layout(), deep, LORA))}) == 3


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2, sequence=True), Layout(recompute=True)], ids=str)
@pytest.mark.parametrize("setting", [NOTHING_ELSE, LORA], ids=["adapters", "and-classes"])
def test_dry_runs_by_layers_are_those_of_all_layers(runs, layout, setting):
    recipe = runs.recipe("gpt", layout, setting, "model.size={width: 64, layers: 6, heads: 4}")
    by_layers, all_of_it = rehearse(recipe, 8, 1), Rehearsal(recipe).micro_batch(8, 1)
    assert by_layers.flops == all_of_it.flops and by_layers.sent == pytest.approx(all_of_it.sent)
    assert by_layers.kept == pytest.approx(all_of_it.kept, rel=0.01)


@pytest.mark.parametrize(("layout", "other"), [
    (Layout(stage=1), Layout(stage=3)),
    pytest.param(Layout(data=2, stage=3), Layout(tensor=2, data=1, stage=1), marks=pytest.mark.slow),
], ids=str)
def test_in_bf16_the_models_own_weights_stay_to_the_last_bit(runs, tmp_path, layout, other):
    """Weights of float32 that bfloat16 does not hold: they are computed with, but not saved, as bfloat16."""
    middle, out = [LORA, "checkpoint.every=5", "training.precision=bf16"], tmp_path / "run"
    begin(runs.recipe("gpt", layout, *middle), out)
    train(runs.recipe("gpt", layout, *middle), out, layout)
    shutil.rmtree(out / "checkpoints" / f"step-{STEPS:07d}")
    train(runs.recipe("gpt", other, *middle), out, other)
    for step in (5, STEPS):
        assert_only_adapters_moved(runs.recipe("gpt", layout, *middle),
                                   read_weights(out / "checkpoints" / f"step-{step:07d}" / "gpt"))
