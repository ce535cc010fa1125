"""Steps of runs of any layout, once more in one process or few: equal, or what differs is named."""

import json
import re
import shutil

import pytest
from layout_runs import Layout, LayoutRuns, use_stand_ins
from rank_runs import run_main, run_ranks
from training_runs import partitioning

from gigatok_ds.cli.main import main
from gigatok_ds.resilience.fault_injection import parse_fault

STEPS = ["training.steps=8", "checkpoint.every=2", "training.validate_every=4", "training.ema_decay=0.5"]


def train_with_faults(recipe, out, settings, *faults):
    from gigatok_ds.training.run import run_training

    use_stand_ins()
    run_training(recipe, out, settings, faults=[parse_fault(text) for text in faults])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return LayoutRuns(tmp_path_factory.mktemp("replay"))


@pytest.fixture(scope="module")
def flipped(runs):
    """A GPT on four ranks, of which the last one's memory flips a bit in step 6."""
    layout, out = Layout(tensor=2, data=2, stage=3, sequence=True), runs.folder / "flipped"
    run_ranks(train_with_faults, 4, runs.recipe("gpt", layout, *STEPS), out, partitioning(layout.stage),
              "flip:rank=3,step=6,tensor=layers.1.feed_forward.w1.weight")
    return out


def test_a_bit_that_flips_on_one_of_four_ranks_is_named(flipped):
    code, said = run_main(["replay", flipped, "--steps", "4:8", "--tolerance", "1e-5"])
    assert code == 1, said
    first, then, last = (re.search(f"{what}: DIFFERENT.*\n  (.*)", said) for what in
                         ("losses and gradient norms", "tensors of step 6", "tensors of step 8"))
    assert first[1].startswith("step 7: "), "the first to compute with it"
    for number, found in ((6, then), (8, last)):
        text = f"step {number}: weights of layers.1.feed_forward.w1.weight (gpt), element 4,095 on rank 3, is "
        assert found[1].startswith(text), said
        ran, here = map(float, re.search(r"is (\S+) in the run and (\S+) here", found[1]).groups())
        assert ran / here == pytest.approx(16, rel=0.01)
    assert not (flipped / "replay-4-8").exists(), "it is removed"


@pytest.mark.parametrize(("ranks", "more"), [(1, []), (4, ["parallel.tensor=2", "parallel.sequence=true"])])
def test_before_that_all_is_equal(flipped, ranks, more, tmp_path):
    """In one process to rounding, on four ranks that are placed as the run's to the last bit."""
    words = ["replay", flipped, "--steps", "2:4", "--tolerance", "1e-5", "--out", tmp_path / "again", *more]
    code, said = run_main(words, ranks=ranks)
    assert code == 0, said
    equal = "equal but for rounding" if ranks == 1 else "equal to the last bit"
    assert re.search(rf"losses and gradient norms: 4, {equal}", said) and re.search(rf"step 4: \d+, {equal}", said)
    assert (tmp_path / "again/checkpoints/step-0000004").is_dir()
    code, said = run_main(words)
    assert code == 2 and "holds a finished replay; remove it, or choose another --out" in said
    assert not list((tmp_path / "again").glob("previews")) and not (tmp_path / "again/probe.npz").exists()


@pytest.mark.slow
def test_a_tokenizers_run_with_every_loss_and_accumulation(runs, tmp_path):
    layout = Layout(tensor=2, data=2, stage=2)
    recipe = runs.recipe("tokenizer", layout, *STEPS, "training.micro_batch_size=2")
    run_ranks(train_with_faults, 4, recipe, tmp_path / "run", partitioning(2))
    run_ranks(replay_with_stand_ins, 1, tmp_path / "run")


def replay_with_stand_ins(run):
    use_stand_ins()
    assert main(["replay", str(run), "--steps", "2:8"]) == 0


REFUSED = [
    (["--steps", "8:4"], "--steps is 8:4; it must be A:B"), (["--steps", "4"], "--steps is 4; it must be A:B"),
    (["--steps", "3:8"], "--steps begins at 3, of which .* holds no complete checkpoint; there are 2, 4, 6, 8"),
    (["--steps", "6:9"], "--steps ends at 9, but the run has training.steps 8"),
    (["--steps", "4:8", "optimizer.lr=1"], "optimizer.lr would make another run of it"),
    (["--steps", "4:8", "--tolerance", "2"], "--tolerance is 2.0; it must be between 0 and 1"),
    (["--steps", "4:8", "--out", "OTHER"], "exists, and is no replay of these steps; choose another --out"),
    (["--steps", "4:8", "--out", "RUN"], "exists, and is no replay of these steps; choose another --out"),
    (["--steps", "4:8", "training.precision=bf16"], "training.precision would make another run of it"),
    (["--steps", "4:8", "checkpoint.every=1"], "checkpoint.every would make another run of it"),
]


@pytest.mark.parametrize(("options", "said"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_replayed_is_refused_in_one_line(flipped, options, said, tmp_path, capsys):
    words = [{"OTHER": str(tmp_path), "RUN": str(flipped)}.get(word, word) for word in options]
    assert main(["replay", str(flipped), *words]) == 2
    assert re.fullmatch(f"gigatok-ds replay: error: .*{said}.*\n", capsys.readouterr().err)


@pytest.mark.parametrize("content", ["[]", "{}", '{"gradient_accumulation_steps": "2"}', None])
def test_a_run_that_does_not_say_how_it_cut_its_batches(flipped, content, tmp_path, capsys):
    run = shutil.copytree(flipped, tmp_path / "run")
    (run / "history.jsonl").unlink()
    (run / "deepspeed.json").unlink()
    if content is not None:
        (run / "deepspeed.json").write_text(json.dumps(json.loads(content)))
    assert main(["replay", str(run), "--steps", "4:8"]) == 2
    assert re.fullmatch(r"gigatok-ds replay: error: .*deepspeed.json.*\n", capsys.readouterr().err)


@pytest.mark.slow
def test_in_bfloat16_it_is_found_by_the_usual_tolerance_in_a_run_that_went_on_in_between(runs, tmp_path):
    """Interrupted at a step that is not logged, on other ranks; logged means that begin elsewhere are left out."""
    out, more = tmp_path / "run", ["training.precision=bf16", "training.log_every=4"]
    run_ranks(train_with_faults, 2, runs.recipe("gpt", Layout(data=2), *STEPS, *more), out, partitioning(1))
    shutil.rmtree(out / "checkpoints/step-0000008")
    (out / "history.jsonl").write_text("".join(line for line in (out / "history.jsonl").read_text().splitlines(True)
                                               if '"step": 8' not in line and '"finished"' not in line))
    run_ranks(train_with_faults, 1, runs.recipe("gpt", Layout(), *STEPS, *more), out, partitioning(1),
              "flip:rank=0,step=8,tensor=layers.0.attention.wqkv.weight")
    code, said = run_main(["replay", out, "--steps", "4:8"])
    assert code == 1 and "losses and gradient norms: none to compare" in said, said
    assert "tensors of step 6: " in said and "tensors of step 6: DIFFERENT" not in said
    assert re.search(r"step 8: weights of layers.0.attention.wqkv.weight .* on rank 0", said), said
