"""A new run from the state of another one, all of it or named parts: other losses, another batch size, other data."""

import re
import shutil

import pytest
import torch
from layout_runs import OVERRIDES, PARTS, Layout, LayoutRuns, train_on_a_rank
from rank_runs import run_ranks
from saved_models import save_models
from saved_runs import read_everything, read_weights
from small_models import small_gpt
from training_runs import partitioning

from gigatok_ds.checkpoint.fragments import EMA, MOMENTS, WEIGHTS, SavedEngine
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.model import ENCODING_PARTS
from gigatok_ds.monitoring.metrics import read_metrics

STEPS = ["training.steps=6", "checkpoint.every=3", "training.validate_every=6", "training.ema_decay=0.5"]
NEXT = {"gpt": ["training.steps=4", "checkpoint.every=2", "training.validate_every=4", "training.ema_decay=0.9",
                "training.global_batch_size=4", "optimizer.lr=2e-3"],
        "tokenizer": ["training.steps=4", "checkpoint.every=2", "training.validate_every=4", "training.ema_decay=0.9",
                      "training.global_batch_size=4", "loss.perceptual={weight: 0.1}",
                      "loss.adversarial.start_step=1"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("phases"))


def train(recipe, out, layout):
    run_ranks(train_on_a_rank, layout.tensor * layout.data, recipe, out, partitioning(layout.stage), timeout=900)


@pytest.fixture(scope="module")
def trunks(runs):
    """A run of each kind with averages and, of the tokenizer, an active discriminator."""
    made = {}

    def of(kind):
        if kind not in made:
            made[kind] = runs.folder / f"trunk-{kind}"
            layout = Layout(tensor=2, stage=1) if kind == "gpt" else Layout(stage=2)
            train(runs.recipe(kind, layout, *STEPS), made[kind], layout)
        return made[kind]

    return of


def convert(runs, kind, source, out, *options):
    return main(["convert", str(source), str(out), "--to", "training", "--recipe", str(runs.folder / f"{kind}.yaml"),
                 *OVERRIDES[kind], *runs.data[kind], *NEXT[kind], *options])


def losses(run):
    return [line["loss"] for line in read_metrics(run) if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt", "tokenizer"])
def test_all_of_it_goes_on_alike_on_every_layout_and_when_resumed(runs, trunks, kind, tmp_path, capsys):
    assert convert(runs, kind, trunks(kind), tmp_path / "one", "--keep", "all") == 0
    assert f"with {'ema, moments' if kind == 'gpt' else 'discriminator, ema, moments, usage'} of" in (
        capsys.readouterr().out)
    for part in {"gpt": ["gpt"], "tokenizer": ["generator", "discriminator"]}[kind]:
        before, steps = read_everything(trunks(kind) / "checkpoints/step-0000006" / part)
        after, also = read_everything(tmp_path / "one/checkpoints/step-0000000" / part)
        assert before.keys() == after.keys() and {kind for kind, _ in after} >= {WEIGHTS, *MOMENTS}
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        assert steps == also and set(also.values()) == {3 if part == "discriminator" else 6}
    shutil.copytree(tmp_path / "one", tmp_path / "other")
    layout = Layout(tensor=2, data=2, stage=3, sequence=True)
    recipe = load_recipe(tmp_path / "one/recipe.yaml")
    train(recipe, tmp_path / "one", Layout())
    train(load_recipe(tmp_path / "one/recipe.yaml", ["parallel.tensor=2", "parallel.sequence=true"]),
          tmp_path / "other", layout)
    shutil.rmtree(tmp_path / "other/checkpoints/step-0000004")
    train(recipe, tmp_path / "other", Layout(data=2, stage=2))
    assert losses(tmp_path / "other")[-4:] == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    one, other = (read_weights(tmp_path / run / "checkpoints/step-0000004" / PARTS[kind]) for run in ("one", "other"))
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5 * float(value.abs().max().clamp(min=0.1)))
    others = ["--keep", "discriminator,usage"] if kind == "tokenizer" else []
    assert convert(runs, kind, trunks(kind), tmp_path / "bare", "--weights", "model", *others) == 0
    train(load_recipe(tmp_path / "bare/recipe.yaml"), tmp_path / "bare", Layout())
    assert losses(tmp_path / "bare")[0] == pytest.approx(losses(tmp_path / "one")[0], rel=1e-5), "the same weights"
    assert losses(tmp_path / "bare")[3] != pytest.approx(losses(tmp_path / "one")[3], rel=1e-5), "other moments"


def test_named_parts_of_a_tokenizers_run_go_on(runs, trunks, tmp_path):
    trunk = trunks("tokenizer")
    frozen = f"training.freeze=[{', '.join(ENCODING_PARTS)}]"
    assert convert(runs, "tokenizer", trunk, tmp_path / "decoder", "--keep", "moments,ema", frozen) == 0
    assert convert(runs, "tokenizer", trunk, tmp_path / "judge", "--keep", "discriminator", "--step", "3") == 0
    assert convert(runs, "tokenizer", trunk, tmp_path / "plain") == 0
    saved = {run: SavedEngine(tmp_path / run / "checkpoints/step-0000000/generator")
             for run in ("decoder", "judge", "plain")}
    assert [engine.layout.kinds for engine in saved.values()] == [[WEIGHTS, *MOMENTS, EMA], [WEIGHTS], [WEIGHTS]]
    usage = {run: engine.read_full("quantizer.codebook_used") for run, engine in saved.items()}
    assert not usage["decoder"].any() and not usage["judge"].any() and usage["plain"].any()
    held = {name for name in saved["decoder"].layout.parameters if saved["decoder"].holds(MOMENTS[0], name)}
    assert {name.partition(".")[0] for name in held} == {"post_quant_conv", "decoder", "cnn_decoder"}
    of_trunk = SavedEngine(trunk / "checkpoints/step-0000006/generator")
    name = "cnn_decoder.conv_out.weight"
    for kind in (WEIGHTS, *MOMENTS, EMA):
        assert torch.equal(saved["decoder"].read(kind, name), of_trunk.read(kind, name))
    assert torch.equal(saved["plain"].read(WEIGHTS, name), of_trunk.read(EMA, name)), "the average, without --keep"
    judged, fresh = (read_weights(tmp_path / run / "checkpoints/step-0000000/discriminator")
                     for run in ("judge", "plain"))
    wanted = read_weights(trunk / "checkpoints/step-0000003/discriminator")
    assert all(torch.equal(judged[key], value) for key, value in wanted.items())
    assert any(not torch.equal(fresh[key], of) for key, of in
               read_weights(trunk / "checkpoints/step-0000006/discriminator").items())
    train(load_recipe(tmp_path / "decoder/recipe.yaml"), tmp_path / "decoder", Layout(data=2, stage=2))
    assert len(losses(tmp_path / "decoder")) == 4


REFUSED = [
    ("gpt", ["--keep", "momenta"], "--keep has 'momenta'; it takes usage, ema, moments, discriminator or all"),
    ("gpt", ["--keep", "all,emma"], "--keep has 'emma'; it takes"),
    ("gpt", ["--keep", "all", "--fresh", "cls_embedding"], "begins anew .*; keep the others alone .--keep ema."),
    ("gpt", ["--keep", "usage"], "--keep usage: a GPT has none; leave it out"),
    ("gpt", ["--keep", "ema", "training.ema_decay=null"], "--keep ema: training.ema_decay is null"),
    ("gpt", ["--keep", "moments", "--weights", "ema"], "--weights ema starts from the average"),
    ("gpt", ["--keep", "moments", "--fresh", "cls_embedding"], "cls_embedding.embedding_table.weight begins anew"),
    ("gpt", ["--keep", "moments", "model.sequence_length=16"], "positional_embedding begins anew or at another size"),
    ("gpt", ["--keep", "moments", "training.lora={rank: 2, alpha: 4}"], "--keep moments: adapters .training.lora. beg"),
    ("tokenizer", ["--keep", "discriminator", "loss.adversarial=null"], "loss.adversarial is null, so nothing would"),
    ("tokenizer", ["--keep", "discriminator", "loss.adversarial.base_channels=16"], "another one, whose .* .8. and"),
]


@pytest.mark.parametrize(("kind", "options", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_kept_is_refused_in_one_line(runs, trunks, kind, options, said, tmp_path, capsys):
    assert convert(runs, kind, trunks(kind), tmp_path / "out", *options) == 2
    assert re.fullmatch(f"gigatok-ds convert: error: .*{said}.*", capsys.readouterr().err.splitlines()[-1])
    assert not list(tmp_path.iterdir())


def test_a_model_alone_has_nothing_to_keep_but_its_usage(runs, tmp_path, capsys):
    save_models(tmp_path, gpt=small_gpt(qk_norm=True))
    assert convert(runs, "gpt", tmp_path / "gpt", tmp_path / "out", "--keep", "moments") == 2
    assert "--keep moments: the source is a model alone" in capsys.readouterr().err
    assert convert(runs, "gpt", tmp_path / "gpt", tmp_path / "out", "--keep", "all",
                   "model.size={width: 32, layers: 2, heads: 2}") == 0
