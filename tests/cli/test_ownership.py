"""A directory that is written in several steps has one owner: the second is refused, a dead one succeeded."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from PIL import Image
from rank_runs import run_main
from training_runs import prepare

from gigatok_ds import ownership
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.results import Results, write_results
from gigatok_ds.ownership import OWNER_FILE, Owner, is_ours, is_unused, owned
from gigatok_ds.sampling.images import check_png, write_png

_HOLDER = """
import os, sys, time
from pathlib import Path
from gigatok_ds import ownership
if "no flock" in sys.argv[2:]:
    ownership._flock = lambda descriptor: None
with ownership.owned(Path(sys.argv[1])):
    if "fork" in sys.argv[2:] and os.fork() == 0:
        time.sleep(600)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    started = []

    def start(*words):
        process = subprocess.Popen([sys.executable, "-c", _HOLDER, str(tmp_path / "run"), *words],
                                   stdout=subprocess.PIPE, start_new_session=True)
        started.append(process)
        assert int(process.stdout.readline()) == process.pid
        return process

    yield start
    for process in started:
        process.stdout.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("flock", ["flock", "no flock"])
def test_the_second_is_refused_by_name_and_takes_over_from_the_dead(flock, holder, tmp_path, monkeypatch):
    if flock == "no flock":
        monkeypatch.setattr(ownership, "_flock", lambda descriptor: None)
    first = holder(flock)
    for _ in range(2):
        told = f"is being written by process {first.pid} of host .*; wait until"
        with pytest.raises(InputError, match=told) as raised, owned(tmp_path / "run"):
            pass
        assert "\n" not in str(raised.value)
    os.kill(first.pid, signal.SIGSTOP)  # it does not beat, but it lives
    with pytest.raises(InputError, match="is being written by"), owned(tmp_path / "run"):
        pass
    first.kill()
    first.wait()
    with owned(tmp_path / "run"):
        assert (
            is_ours(tmp_path / "run") and json.loads((tmp_path / "run" / OWNER_FILE).read_bytes())["pid"] == os.getpid()
        )
        with pytest.raises(InputError, match="this very process"), owned(tmp_path / "run"):
            pass
    assert not is_ours(tmp_path / "run") and os.listdir(tmp_path / "run") == []


def test_what_a_dead_owner_has_forked_does_not_keep_it(holder, tmp_path):
    first = holder("fork")
    first.kill()
    first.wait()
    with owned(tmp_path / "run"):
        pass


def another(directory, **otherwise):
    """The mark of an owner on another host."""
    owner = replace(Owner.this_process(), host="elsewhere", boot="another kernel", **otherwise)
    directory.mkdir(exist_ok=True)
    (directory / OWNER_FILE).write_bytes(json.dumps(asdict(owner)).encode().ljust(1024))
    return owner


def test_an_owner_on_another_host_is_dead_when_its_number_stands_still(messages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ownership, "SILENT_SECONDS", 3.0)
    another(tmp_path / "run")
    with owned(tmp_path / "run"):
        pass
    assert "process" in capsys.readouterr().err
    owner, over = another(tmp_path / "run"), threading.Event()

    def beat():
        number = 0
        while not over.wait(0.05):
            number += 1
            another(tmp_path / "run", token=owner.token, beat=number)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(InputError, match="of host elsewhere"), owned(tmp_path / "run"):
            pass
    finally:
        over.set()
        thread.join()


def test_an_owner_beats_and_one_that_was_succeeded_ends(tmp_path):
    code = _HOLDER.replace("from gigatok_ds import ownership", "from gigatok_ds import "
                                                               "ownership\nownership.BEAT_SECONDS = 0.05")
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while json.loads((tmp_path / "run" / OWNER_FILE).read_bytes())["beat"] < 3:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        another(tmp_path / "run", token="ours")
        assert "now belongs to process" in process.stderr.read() and process.wait() == 2


def test_of_many_that_start_at_once_one_owns_at_a_time(tmp_path):
    code = ("import sys, time\nfrom pathlib import Path\nfrom gigatok_ds.ownership import owned\nprint(flush=True)\n"
            "input()\n"
            "try:\n    with owned(Path(sys.argv[1])):\n        Path(sys.argv[1], 'in').touch(exist_ok=False)\n"
            "        time.sleep(0.2)\n        Path(sys.argv[1], 'in').unlink()\n        print('owned')\n"
            "except ValueError as error:\n    print('refused', error)\n")
    started = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE,
                                stdout=subprocess.PIPE, text=True) for _ in range(5)]
    for process in started:
        process.stdout.readline()
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    said = [process.communicate()[0] for process in started]
    assert all(process.returncode == 0 for process in started)
    assert sum(text.startswith("owned") for text in said) >= 1
    assert all(text == "owned\n" or "is being written by" in text for text in said), said


@pytest.mark.parametrize("content", [b"", b"null", b"[]", b"{}", b"\xff" * 3000, b'{"token": 1}', b"[" * 5000])
def test_what_is_no_mark_of_an_owner_does_not_stop_anybody(content, tmp_path):
    (tmp_path / OWNER_FILE).write_bytes(content)
    assert is_unused(tmp_path)
    with owned(tmp_path):
        pass


def test_a_directory_that_was_made_for_nothing_is_removed(tmp_path):
    with pytest.raises(RuntimeError), owned(tmp_path / "a"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_killed_at_random_moments_the_next_one_owns(tmp_path, holder):
    draw = random.Random(0)
    for _ in range(30):
        process = holder(draw.choice(["fork", "flock"]))
        time.sleep(draw.random() * 0.1)
        process.kill()
        process.wait()
        with owned(tmp_path / "run"):
            pass


FOREIGN_RESULTS = {"results.json": '{"figures": {}}', "results.md": "# My thesis", "results.html": "<p>mine",
                   "picture-1.png": "mine"}


@pytest.mark.parametrize("name", FOREIGN_RESULTS)
def test_results_replace_results_of_ours_only(name, tmp_path):
    results = Results(title="t", figures={"a": 1.0}, settings={}, pictures={"c": b"png"})
    (tmp_path / name).write_text(FOREIGN_RESULTS[name])
    with pytest.raises(InputError, match=f"{name} is there and"):
        write_results(tmp_path, results)
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == FOREIGN_RESULTS[name]
    write_results(tmp_path / "own", results)
    write_results(tmp_path / "own", results)


def test_pictures_replace_pictures_of_ours_only(tmp_path):
    import numpy as np

    pixels = np.zeros((4, 4, 3), np.uint8)
    write_png(pixels, tmp_path / "ours.png")
    check_png(tmp_path / "ours.png")
    check_png(tmp_path / "none.png")
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "text.png").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to("nowhere")
    for name in ("photo.png", "text.png", "folder.png", "link.png"):
        with pytest.raises(InputError, match=f"{name} is there"):
            check_png(tmp_path / name)


def test_a_second_training_is_refused_before_it_touches_anything(holder, tmp_path):
    """As when a job is queued again beside a manual start: the first one's half-written checkpoint is not removed."""
    recipe = prepare(tmp_path)["gpt"]
    first = holder()
    run = tmp_path / "run"
    (run / "checkpoints" / "step-0000004.partial").mkdir(parents=True)
    (run / "history.jsonl").write_text("")
    before = {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.name != OWNER_FILE}
    code, said = run_main(["train", tmp_path / "gpt.yaml", "--out", run, *recipe])
    assert code == 2 and f"is being written by process {first.pid}" in said, said
    assert said.count("error:") == 1 and "Traceback" not in said
    assert {str(path): path.stat().st_mtime_ns for path in run.rglob("*") if path.name != OWNER_FILE} == before
    first.kill()
    first.wait()
    assert run_main(["train", tmp_path / "gpt.yaml", "--out", run, *recipe, "training.steps=1"])[0] == 0
    assert not (run / OWNER_FILE).exists() and not list(run.glob("checkpoints/*.partial"))
