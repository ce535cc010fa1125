"""Plans: rehearsals in few layers equal those of all, FLOPs equal torch's, layouts fit, and training takes them."""

import functools
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import yaml
from training_runs import GPT, TOKENIZER, prepare, start

from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe, recipe_names
from gigatok_ds.dry_run.by_layers import rehearse
from gigatok_ds.dry_run.dry_run import Rehearsal, shapes_of
from gigatok_ds.errors import InputError
from gigatok_ds.losses.composition import TokenizerObjective
from gigatok_ds.monitoring.flops import GPTFlops, TokenizerFlops
from gigatok_ds.planning.auto import cluster_here
from gigatok_ds.planning.calibration import calibrated, read_run
from gigatok_ds.planning.cluster import parse_cluster
from gigatok_ds.planning.devices import DEVICES, device_named
from gigatok_ds.planning.phases import fullest, longest, phases_of
from gigatok_ds.planning.plan_cache import known_dry_runs, micro_batch
from gigatok_ds.planning.planner import BLOCKS, EVERYTHING, NOTHING, PlannedLayout, Planner
from gigatok_ds.planning.renew import dry_runs
from gigatok_ds.planning.speed import Assumptions

DEEP = {"tokenizer": ["model.encoder={width: 64, layers: 5, heads: 2}",
                      "model.decoder={width: 32, layers: 4, heads: 2}"],
        "gpt": ["model.size={width: 64, layers: 5, heads: 2}"]}
TEXTS = {"tokenizer": TOKENIZER, "gpt": GPT}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """(kind, overrides) -> recipe of a few layers."""
    folder = tmp_path_factory.mktemp("recipes")
    for kind, text in TEXTS.items():
        (folder / f"{kind}.yaml").write_text(text)
    return lambda kind, *overrides: load_recipe(folder / f"{kind}.yaml", [*DEEP[kind], *overrides])


@pytest.mark.parametrize("kind, overrides", [
    ("gpt", []), ("gpt", ["parallel.tensor=2", "parallel.sequence=true"]),
    ("gpt", ["parallel.recompute_every=1", "model.drop_path=0.1", "training.precision=bf16"]),
    ("tokenizer", ["training.precision=bf16"]),
    ("tokenizer", ["parallel.recompute_every=1", "parallel.recompute_cnn=true", "parallel.tensor=2"]),
    ("tokenizer", ["model.layout=2d", "model.latent_tokens=64", "loss.adversarial.adaptive_weight=true",
                   "model.semantic_head={depth: 3, teacher_width: 24}", "loss.semantic={teacher: "
                                                                        "vit_tiny_patch16_224}"]),
])
def test_a_few_layers_tell_of_all(recipes, kind, overrides):
    recipe = recipes(kind, *overrides)
    if recipe.kind == "tokenizer" and recipe.model.semantic_head:
        head = replace(recipe.model.semantic_head, teacher_width=192)
        recipe = replace(recipe, model=replace(recipe.model, semantic_head=head))
    assert rehearse(recipe, 8, step=4) == Rehearsal(recipe).micro_batch(8, step=4)


@pytest.mark.parametrize("recompute", [0, 1])
def test_flops_are_those_of_training(recipes, recompute):
    gpt = recipes("gpt", f"parallel.recompute_every={recompute}")
    counted, found = GPTFlops(gpt).of_step(1), rehearse(gpt, 8, 1)
    assert found.flops == counted.hardware and (recompute or found.model == counted.model)
    tokenizer = recipes("tokenizer", f"parallel.recompute_every={recompute}")
    objective = TokenizerObjective(tokenizer.loss, perceptual=None, teacher=None)
    counter = TokenizerFlops(tokenizer, objective, 8, torch.device("cpu"))
    for step in (3, 4):
        counted, found = counter.of_step(step), rehearse(tokenizer, 8, step)
        assert found.flops == counted.hardware and (recompute or found.model == counted.model)


def test_traffic_of_tensor_ranks_is_its_closed_form(recipes):
    """Of a block two sums forward (Shoeybi et al. 2019, arXiv:1909.08053, figure 4), and three backward: of the inputs
    of q, k and v together, and of the two that SwiGLU multiplies."""
    sizes = [f"model.size={{width: 64, layers: {layers}, heads: 2}}" for layers in (4, 5)]
    few, many = (rehearse(recipes("gpt", "parallel.tensor=2", size), 8, 1) for size in sizes)
    tokens, width, bytes_ = 8, 64, 4
    assert many.sent - few.sent == (2 + 3) * (2 * 1 / 2) * tokens * 8 * width * bytes_
    apart, parts = (rehearse(recipes("gpt", "parallel.tensor=2", f"parallel.sequence={sequence}"), 8, 1)
                    for sequence in ("false", "true"))
    assert parts.kept < apart.kept and parts.sent > apart.sent, "norms are summed, and inputs gathered once more"


def test_parameters_are_the_networks_own(recipes):
    recipe = recipes("tokenizer")
    from gigatok_ds.checkpoint.original import build_on_meta
    from gigatok_ds.losses.composition import build_discriminator

    judge = build_discriminator(recipe.loss.adversarial, image_size=16)
    full = {"generator": sum(p.numel() for p in build_on_meta(recipe.model).parameters()),
             "discriminator": sum(p.numel() for p in judge.parameters())}
    assert {name: sum(sizes) for name, sizes in shapes_of(recipe).trained.items()} == full
    assert sum(shapes_of(recipes("gpt",
                                 "parallel.tensor=2")).trained["gpt"]) < sum(shapes_of(recipes("gpt")).trained["gpt"])


def test_phases(recipes):
    phases = phases_of(recipes("tokenizer"))
    assert [(phase.step, phase.count) for phase in phases] == [(1, 3), (4, 2), (6, 1), (7, 2)]
    assert phases[1].active == {"the entropy term", "direct reconstruction", "the discriminator"}
    assert fullest(phases) == [phases[1]] and longest(phases) == phases[0]
    assert [phase.count for phase in phases_of(recipes("gpt"))] == [8]


@pytest.mark.parametrize("text, said", [
    ("8x8", "write HOSTSxGPUSxDEVICE"), ("8x8xV100", "'V100' is not known; known are A100-40GB"),
    ("0x8xH100", "at least one"),
])
def test_clusters_that_are_none(text, said):
    with pytest.raises(InputError, match=said):
        parse_cluster(text)


def test_clusters():
    cluster = parse_cluster("16x4xH100", memory_gb=60, network_gbps=800)
    assert (cluster.hosts, cluster.per_host, cluster.ranks) == (16, 4, 64)
    assert cluster.device.memory == 60e9 and cluster.device.network == 100e9
    assert str(parse_cluster("8xA100-40GB")) == "1x8xA100-40GB"
    assert device_named("NVIDIA A100-SXM4-80GB", 85_000_000_000) == DEVICES["A100-80GB"]
    assert device_named("NVIDIA H100 80GB HBM3", 85_000_000_000) == DEVICES["H100"]
    with pytest.raises(InputError, match="--auto does not know Tesla T4"):
        device_named("Tesla T4", 16 << 30)
    here = cluster_here({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_SIZE": "4"})
    assert (here.hosts, here.per_host) == (2, 4)


def test_less_memory_computes_more_again_and_then_nothing_fits(recipes, monkeypatch):
    recipe = recipes("tokenizer", "training.global_batch_size=64", "loss.auxiliary=null", "loss.adversarial=null",
                     "loss.quantizer.entropy=0.0")

    # What is rehearsed does not depend on the memory.
    monkeypatch.setattr("gigatok_ds.planning.planner.micro_batch", functools.cache(micro_batch))

    def planner(gigabytes):
        # Kernels take no time, so that what is computed decides.
        assumptions = Assumptions(kernel_seconds=0.0, reserved=0.0, memory=1.0)
        return Planner(recipe, parse_cluster("1x4xH100", memory_gb=gigabytes), assumptions, tensor=1)

    roomy = planner(80).recommended()
    assert roomy.fits and roomy.layout == PlannedLayout(tensor=1, sequence=False, stage=1, micro=16, recompute=NOTHING)
    choices = planner(80).choices(roomy)
    assert [choice.layout.recompute for choice in choices] == [NOTHING, BLOCKS, EVERYTHING]
    kept = [choice.memory.activations for choice in choices]
    assert kept[0] > kept[1] > kept[2] and choices[0].time.seconds < choices[2].time.seconds
    tight = planner(roomy.memory.peak / 1e9 - 1e-3).recommended()
    assert tight.fits and tight.memory.peak < roomy.memory.peak and tight.layout != roomy.layout
    with pytest.raises(InputError, match=r"does not fit 1x4xH100: at least [\d.]+ GB are needed"):
        planner(0.005).recommended()
    with pytest.raises(InputError, match="global batch of 64 cannot be spread"):
        Planner(recipe, parse_cluster("1x7xH100"), Assumptions()).recommended()


def test_more_zero_stages_keep_less(recipes):
    recipe = recipes("gpt", "training.precision=bf16", "training.ema_decay=0.9")
    planner = Planner(recipe, parse_cluster("1x4xH100"), Assumptions())
    plans = [planner.plan(PlannedLayout(tensor=1, sequence=False, stage=stage, micro=2, recompute=NOTHING)) for stage
             in range(4)]
    always = [plan.memory.always for plan in plans]
    assert always == sorted(always, reverse=True) and len(set(always)) == 4
    elements = shapes_of(recipe).elements
    assert plans[0].memory.states["gpt"].kept == elements * (2 + 2 + 4 + 8 + 4 / 4)
    assert plans[3].memory.states["gpt"].kept == elements * (2 + 2 + 4 + 8 + 4) / 4
    assert plans[3].traffic.data_inside == pytest.approx(1.5 * plans[1].traffic.data_inside)


@pytest.mark.parametrize("name", [
    "GPT-B", *(pytest.param(name, marks=pytest.mark.slow) for name in recipe_names() if name != "GPT-B"),
])
def test_published_rehearsals_are_those_of_this_code(name):
    known = known_dry_runs()
    for key, found in dry_runs(name):
        assert known.get(key) == found, "the figures have moved; renew them: python -m gigatok_ds.planning.renew"


def test_published_recipes_are_planned_without_torch():
    code = ("import sys; sys.modules['torch'] = None; from gigatok_ds.cli.main import main; "
            "sys.exit(main(['plan', 'VQ_XLXXL256', '--cluster', '8x8xH100']))")
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert finished.returncode == 0 and "generator 2,894.0 M" in finished.stdout, finished.stderr


def test_the_command(recipes, tmp_path, capsys):
    (tmp_path / "gpt.yaml").write_text(GPT)
    assert main(["plan", str(tmp_path / "gpt.yaml"), "--cluster", "2x4xH100", "--json",
                 str(tmp_path / "plan.json")]) == 0
    said = capsys.readouterr().out
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["layout"]["tensor"] == 1 and found["layout"]["data"] == 8 and found["fits"]
    assert " ".join(found["arguments"]) in said and "of the GPU's memory" in said and "GPU-hours" in said
    assert sum(found["memory"]["parts"].values()) >= found["memory"]["peak"] > 0
    assert found["run"]["gpu_hours"] == pytest.approx(8 * 24 * found["run"]["days"])
    assert main(["plan", str(tmp_path / "gpt.yaml"), "--cluster", "1x4xH100", "--tp", "2", "--zero", "3", "--json",
                 "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["layout"]["tensor"], found["layout"]["stage"]) == (2, 3) and found["sent_per_gpu"]["tensor"] > 0
    for wrong, line in ((["--tp", "3"], "do not divide"), (["--calibrate", str(tmp_path)], "is not a training run")):
        assert main(["plan", str(tmp_path / "gpt.yaml"), "--cluster", "1x4xH100", *wrong]) == 2
        assert line in capsys.readouterr().err


def test_figures_replace_figures_of_ours_only(recipes, tmp_path, capsys):
    (tmp_path / "gpt.yaml").write_text(GPT)
    out, words = tmp_path / "plan.json", ["plan", str(tmp_path / "gpt.yaml"), "--cluster", "1x1xH100", "--json"]
    for precious in (b'{"recipe": "mine"}', b"precious", b"[]", b""):
        out.write_bytes(precious)
        assert main([*words, str(out)]) == 2
        assert "left alone" in capsys.readouterr().err and out.read_bytes() == precious
    out.unlink()
    for _ in range(2):
        assert main([*words, str(out)]) == 0
    assert main([*words, str(tmp_path)]) == 2 and "left alone" in capsys.readouterr().err


@pytest.mark.parametrize("name, text, said", [
    ("deepspeed.json", "{", "deepspeed.json is damaged"), ("deepspeed.json", "[]", "deepspeed.json is damaged"),
    ("deepspeed.json", '{"zero_optimization": {"stage": "2"}, "train_micro_batch_size_per_gpu": 1}',
     "deepspeed.json is damaged"),
    ("deepspeed.json", '{"zero_optimization": 2}', "deepspeed.json is damaged"),
    ("history.jsonl", "", "on how many ranks"),
    ("history.jsonl", '{"time": 1, "event": "started", "ranks": "2"}\n', "on how many ranks"),
    ("metrics.jsonl", '{"time": 1, "step": 1, "throughput/step_seconds": null}\n' * 5, "has logged 0 times"),
])
def test_a_damaged_run_is_no_measurement(name, text, said, tmp_path):
    (tmp_path / "recipe.yaml").write_text(GPT)
    files = {"deepspeed.json": '{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 8}',
             "history.jsonl": '{"time": 1, "event": "started", "ranks": 1}\n',
             "metrics.jsonl": "".join(f'{{"time": {i}, "step": {i}, "throughput/step_seconds": 0.5}}\n' for i
                                      in range(1, 6))}
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    assert read_run(tmp_path).seconds == 0.5
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        read_run(tmp_path)


def test_training_takes_what_is_recommended_and_calibrates_it(tmp_path, capsys):
    names = prepare(tmp_path)["gpt"]
    out = tmp_path / "run"
    code, output = start([tmp_path / "gpt.yaml", "--out", out, "--auto", *names, "training.global_batch_size=16"],
                         ranks=2)
    assert code == 0, output
    recipe = load_recipe(tmp_path / "gpt.yaml", [*names, "training.global_batch_size=16"])
    layout = Planner(recipe, parse_cluster("1x2xCPU"), Assumptions()).recommended().layout
    assert " ".join(layout.arguments(recipe)) in output
    settings, kept = json.loads((out / "deepspeed.json").read_text()), yaml.safe_load((out / "recipe.yaml").read_text())
    assert settings["zero_optimization"]["stage"] == layout.stage
    assert settings["train_micro_batch_size_per_gpu"] == kept["training"]["micro_batch_size"] == layout.micro
    assert read_run(out).layout == layout
    cluster = parse_cluster("1x2xCPU")
    measured = calibrated(Assumptions(), [out], cluster)
    again = Planner(read_run(out).recipe, cluster, measured).plan(layout)
    assert again.time.seconds == pytest.approx(read_run(out).seconds)
    code, output = start([tmp_path / "gpt.yaml", "--out", out, "--auto", *names, "parallel.recompute_every=1"])
    assert code == 2 and "parallel.recompute_every=1 and --auto both say how to train" in output
