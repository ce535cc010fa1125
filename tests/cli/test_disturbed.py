"""Commands killed, interrupted, stopped for a while or not read any more at random moments, and run again: the same
result.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from disturbed_runs import DISTURBANCES, Command, check_disturbed, content, moments
from saved_models import save_models
from small_models import small_gpt, small_tokenizer
from small_shards import encoded, make_images
from training_runs import image_shards

import gigatok_ds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Small models, images in directories, as shards and as codes."""
    folder = tmp_path_factory.mktemp("world")
    save_models(folder, tok=small_tokenizer(), gpt=small_gpt())
    make_images(folder / "photos",
                {f"class-{label}/{number}.jpg": encoded(number) for label in range(5) for number in range(8)})
    image_shards(folder / "images", 40)
    image_shards(folder / "test_images", 10)
    Command(["recipes"], folder).run()  # starts the server, which must not count as a command's time
    return folder


def commands(world, folder):
    """By name; each result is a path of its own in `folder`."""
    tok, gpt, images = world / "tok", world / "gpt", world / "images"

    def sample(out):
        return ["sample", "--gpt", gpt, "--tokenizer", tok, "--count", "30", "--batch-size", "3", "--out", folder / out]

    return {
        "make-shards": Command(["make-shards", world / "photos", "--out", folder / "shards", "--samples-per-shard", "5",
                                "--workers", "2"], folder / "shards", "exists and is not empty"),
        "extract-codes": Command(["extract-codes", tok, images, "--out", folder / "codes", "--crops", "flip",
                                  "--samples-per-shard", "4", "--workers", "1", "--batch-size", "4"], folder / "codes"),
        "sample": Command(sample("drawn.npz"), folder / "drawn.npz"),
        "sample into a directory": Command(sample("drawn"), folder / "drawn"),
        "evaluate": Command(["evaluate", "reconstruction", tok, world / "test_images", "--out", folder / "results",
                             "--allow", "count"], folder / "results"),
        "probe": Command(["probe", tok, "--train", images, "--val", world / "test_images", "--out", folder / "probe",
                          "--epochs",
                          "6", "--warmup-epochs", "1", "--batch-size", "8", "--workers", "1"], folder / "probe"),
        "convert": Command(["convert", tok, folder / "converted", "--dtype", "bf16", "--verify"], folder / "converted",
                           "exists already"),
    }


NAMES = ["make-shards", "extract-codes", "sample", "sample into a directory", "evaluate", "probe", "convert"]


def check(name, world, folder, count, seed):
    """Each disturbance `count` times at random moments."""
    (folder / "whole").mkdir()
    command = commands(world, folder / "whole")[name]
    full = command.run()
    assert full.code == 0, full
    reference = content(command.out)
    assert reference
    for number, how in enumerate(DISTURBANCES):
        for turn, moment in enumerate(moments(full.seconds, count, seed + number)):
            place = folder / f"{how}-{turn}"
            place.mkdir()
            check_disturbed(commands(world, place)[name], reference, how, moment)
            shutil.rmtree(place)


@pytest.mark.parametrize("name", ["extract-codes", "sample", "evaluate"])  # others: below
def test_a_disturbed_command_run_again_leaves_the_same(name, world, tmp_path):
    check(name, world, tmp_path, 1, seed=sum(map(ord, name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_command_disturbed_at_many_moments_and_run_again_leaves_the_same(name, world, tmp_path):
    check(name, world, tmp_path, 25, seed=1)


def fresh(words, **how):
    """`python -m gigatok_ds WORDS` in an interpreter of its own, in a session of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(gigatok_ds.__file__).parent.parent)}
    return subprocess.Popen([sys.executable, "-m", "gigatok_ds", *map(str, words)], start_new_session=True,
                            env=environment, **how)


def check_interrupted(words, moment):
    """Also while it imports: the only time that a user may take back a command that he has mistyped."""
    process = fresh(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    time.sleep(moment)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (0, 130) and "Traceback" not in said, (moment, process.returncode, said)


def check_unread(words):
    process = fresh(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    assert process.wait() in (0, 141) and "Broken" not in said and "Exception" not in said, (words, said)


def test_a_fresh_interpreter_is_interrupted_and_unread_in_silence(world, tmp_path):
    words = commands(world, tmp_path)["sample"].words
    check_interrupted(words, 1.0)
    for unread in (["recipes"], ["--help"], ["inspect", world / "gpt"]):
        check_unread(unread)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_fresh_interpreter_is_interrupted_at_any_moment(name, world, tmp_path):
    for number, moment in enumerate(moments(6, 12, seed=2)):
        # Python itself starts before.
        check_interrupted(commands(world, tmp_path / str(number))[name].words, 0.3 + moment)
    check_unread(commands(world, tmp_path)[name].words)


SHORT = [word for kind in ("tokenizer", "gpt") for setting in ("training.steps=6", "schedule.warmup_steps=6",
         "training.global_batch_size=8", "checkpoint.every=2") for word in (f"--{kind}", setting)]
SHORT += ["--tokenizer", "loss.adversarial.start_step=3"]


@pytest.mark.slow
def test_a_disturbed_demo_run_again_ends_the_same(world, tmp_path):
    """Its models, figures and samples; times and dates are others. A training that outlives a killed demo has to end
    first.
    """
    def demo(out):
        return ["demo", "--data", world / "photos", "--out", out, *SHORT]

    def result(out):
        names = ("metrics.json", "samples.npz", "export/tokenizer/model.safetensors", "export/gpt/model.safetensors")
        return {name: (out / name).read_bytes() for name in names}

    def run(out):
        process = fresh(demo(out), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        return process, process.communicate(timeout=900)[1]

    started = time.monotonic()
    process, said = run(tmp_path / "whole")
    assert process.returncode == 0, said
    seconds, reference = time.monotonic() - started, result(tmp_path / "whole")
    for number, moment in enumerate(moments(seconds, 12, seed=3)):
        out, which = tmp_path / str(number), (signal.SIGKILL, signal.SIGINT, signal.SIGSTOP)[number % 3]
        with open(tmp_path / "said", "w+") as file:
            process = fresh(demo(out), stdout=subprocess.DEVNULL, stderr=file)
            time.sleep(1 + moment)
            if which == signal.SIGKILL:
                process.kill()
            else:
                os.killpg(process.pid, which)
            if which == signal.SIGSTOP:
                time.sleep(1)
                os.killpg(process.pid, signal.SIGCONT)
            code, said = process.wait(900), (tmp_path / "said").read_text()
        assert code in (0, {signal.SIGKILL: -9, signal.SIGINT: 130,
                            signal.SIGSTOP: 0}[which]) and "Traceback" not in said, (moment, said)
        deadline = time.monotonic() + 300
        while True:
            again, said = run(out)
            if not again.returncode or time.monotonic() > deadline:
                break
            assert again.returncode == 2 and "is being written by process" in said and "Traceback" not in said, (
                which,
                moment,
                said,
            )
            time.sleep(2)
        assert again.returncode == 0 and result(out) == reference, (which, moment, said)
