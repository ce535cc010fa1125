"""Jobs that end by a fault are started again while they make progress; what starting again would not mend is final."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from places import ROOT
from rank_processes import ranks_below, wait_for
from training_runs import launch, prepare

from gigatok_ds.checkpoint.run_directory import complete_checkpoints
from gigatok_ds.cli.launcher import main
from gigatok_ds.cluster.launch import Launch, Options
from gigatok_ds.cluster.restarts import newest_checkpoint, run_with_restarts
from gigatok_ds.monitoring.history import read_history
from gigatok_ds.resilience.preemption import REQUEUE


def tries(codes, most, reached=None):
    """(exit code, waits, how many were started) of a job that ends with each of `codes` in turn."""
    waits, started, progress = [], [], iter(reached or [0] * 100)

    def start(restarts):
        assert restarts == len(started)
        started.append(1)
        return subprocess.Popen([sys.executable, "-c", f"import os; os._exit({codes[len(started) - 1]})"])

    return run_with_restarts(start, most, lambda: next(progress), sleep=waits.append), waits, len(started)


@pytest.mark.parametrize("code", [0, 2, REQUEUE])
def test_final_codes_end_the_tries(code):
    assert tries([code], 5) == (code, [], 1)


def test_a_fault_is_tried_again_after_growing_waits():
    assert tries([1, 1, 1, 0], 5) == (0, [5, 10, 20], 4)
    assert tries([1] * 10, 8)[1] == [5, 10, 20, 40, 80, 160, 300, 300]


def test_tries_in_a_row_are_bounded(messages, capsys):
    assert tries([1, 1, 3, 0], 2) == (3, [5, 10], 3)
    assert "2 restarts in a row without a new checkpoint; giving up" in capsys.readouterr().err


def test_progress_begins_the_count_anew():
    """progress is asked before and after each try."""
    assert tries([1, 1, 1, 1, 0], 1, [0, 1, 1, 2, 2, 3, 3, 4, 4, 4]) == (0, [5, 5, 5, 5], 5)


def test_a_killed_job_has_the_code_of_a_shell():
    def start(restarts):
        return subprocess.Popen([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])

    assert run_with_restarts(start, 0, lambda: 0) == 128 + 9


def test_signals_reach_the_job_and_end_the_tries():
    def start(restarts):
        threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

    began = time.monotonic()
    assert run_with_restarts(start, 5, lambda: 0) == 128 + signal.SIGTERM
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("words", [
    ["GPT-B", "--out", "DIR"], ["GPT-B", "--out=DIR"], ["--out=DIR", "GPT-B", "training.steps=3"],
    ["GPT-B", "--ou", "DIR"],
    ["--out", "other", "GPT-B", "--zero=3", "--out", "DIR"], ["GPT-B", "--deepspeed", "--out=DIR", "--out", "DIR"],
])
def test_progress_is_looked_for_where_the_arguments_say(tmp_path, monkeypatch, words):
    """As `gigatok-ds train` reads them: three faults, each after a new checkpoint, with one restart in a row allowed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("gigatok_ds.cluster.restarts.FIRST_WAIT", 0.01)
    script = ("import pathlib, sys; folder = pathlib.Path('DIR/checkpoints'); folder.mkdir(parents=True, "
              "exist_ok=True); latest = folder / 'latest'; before = latest.read_text() if latest.exists() else ''; "
              "latest.write_text(before + 'x'); sys.exit(len(before) < 3)")
    planned = Launch(command=[sys.executable, "-c", script], env_file=None)
    monkeypatch.setattr("gigatok_ds.cli.launcher.plan", lambda *_, **__: planned)
    if "--deepspeed" in words:  # which takes a value, so that this is no command line of train
        with pytest.raises(SystemExit) as caught:
            main(["--max-restarts", "1", *words])
        assert caught.value.code == 2 and not (tmp_path / "DIR").exists()
        return
    assert main(["--max-restarts", "1", *words]) == 0
    assert (tmp_path / "DIR" / "checkpoints" / "latest").read_text() == "xxxx"
    assert newest_checkpoint(tmp_path) is None


@pytest.mark.slow
@pytest.mark.parametrize("wrong",
                         [["optimizer.lr=high"], ["optimizer.rl=1"], ["--zero", "9"], ["--deepspeed", "none.json"]])
def test_an_error_of_the_command_line_is_not_tried_again(tmp_path, wrong):
    names = prepare(tmp_path)["gpt"]
    job = launch(["--max-restarts", "3", tmp_path / "gpt.yaml", "--out", tmp_path / "run", *names, *wrong], 2)
    output, _ = job.communicate(timeout=200)
    assert job.returncode == 2 and "restart 1" not in output and "Traceback" not in output, output
    assert not (tmp_path / "run").exists()


def test_a_try_that_cannot_be_made_is_a_try():
    waits = []
    assert run_with_restarts(lambda restarts: None, 3, lambda: 0, sleep=waits.append) == 1 and waits == [5, 10, 20]


def test_options_of_the_launcher_come_first(monkeypatch, capsys):
    assert Options.taken_from(["--max-restarts", "3", "--min-hosts", "2", "GPT-B", "--out", "x"]) == (
        Options(max_restarts=3, min_hosts=2), ["GPT-B", "--out", "x"])
    assert Options.taken_from(["--dry-run", "GPT-B"]) == (Options(dry_run=True), ["GPT-B"])
    assert Options.taken_from(["GPT-B", "--max-restarts"]) == (Options(), ["GPT-B", "--max-restarts"])
    for words, said in ((["--max-restarts", "x"], "max_restarts is 'x'"),
                        (["--max-restarts"], "max_restarts is 'nothing'"),
                        (["--min-hosts", "2", "GPT-B"], "--min-hosts is for restarts")):
        assert main(words) == 2 and said in capsys.readouterr().err


# Stands for ssh: runs the command here for hosts named `good`, and reaches no other.
SSH = """#!/bin/sh
while [ "$1" = -o ]; do shift 2; done
case "$1" in good*) shift; exec sh -c "$*" ;; esac
echo "ssh: connect to host $1 port 22: Connection refused" >&2
exit 255
"""
# Stands for DeepSpeed's launcher: tells what it was given, and that the first two starts failed.
DEEPSPEED = """#!/bin/sh
while [ "$1" != --hostfile ]; do shift; done
echo start >> starts
echo "start $(wc -l < starts): $(tr '\\n' ' ' < "$2")"
test "$(wc -l < starts)" -gt 2
"""


def test_a_host_that_is_gone_is_left_out(tmp_path):
    """Through launch/train.sh, with stand-ins for ssh and for what starts the ranks of several hosts."""
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, text in (("ssh", SSH), ("pdsh", "#!/bin/sh\n"), ("deepspeed", DEEPSPEED)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "hosts").write_text("gone slots=2\ngood-1 slots=2\ngood-2 slots=2\n")
    script = f"""
import sys
from gigatok_ds.cli import launcher
from gigatok_ds.cluster import launch, restarts
launch._deepspeed = lambda: {str(tools / "deepspeed")!r}
restarts.FIRST_WAIT = 0.1
sys.exit(launcher.main(sys.argv[1:]))
"""
    environment = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}", "HOSTFILE": "hosts",
                                "PYTHONPATH": str(ROOT)}

    def run(*options):
        (tmp_path / "starts").unlink(missing_ok=True)
        finished = subprocess.run([sys.executable, "-c", script, *options, "GPT-B", "--out", "x"], cwd=tmp_path,
                                  text=True, env=environment, capture_output=True, check=False, timeout=200)
        return finished.returncode, [line for line in finished.stdout.splitlines()
                                     if line.startswith("start")], finished.stderr

    code, starts, said = run("--max-restarts", "3", "--min-hosts", "2")
    assert code == 0, said
    assert starts == ["start 1: gone slots=2 good-1 slots=2 good-2 slots=2 ", "start 2: good-1 slots=2 good-2 slots=2 ",
                      "start 3: good-1 slots=2 good-2 slots=2 "]
    assert "leaving out gone: ssh does not reach it" in said and "GPUs" not in said
    code, starts, said = run("--max-restarts", "2")
    assert code == 1 and len(starts) == 1 and "2 hosts can take part, and 3 must (--min-hosts)" in said


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_a_restart_only(tmp_path):
    """Two ranks through launch/train.sh; the run ends by itself, from its last checkpoint on."""
    names = prepare(tmp_path)["gpt"]
    out = tmp_path / "run"
    steps = ["training.steps=160", "checkpoint.every=20", "checkpoint.keep=2", "training.validate_every=160"]
    job = launch(["--max-restarts", "2", tmp_path / "gpt.yaml", "--out", out, *names, *steps], 2)
    try:
        wait_for(lambda: complete_checkpoints(out) or job.poll() is not None, 200)
        os.kill(ranks_below(job.pid)[1], signal.SIGKILL)
        output, _ = job.communicate(timeout=200)
    finally:
        job.kill()
    assert job.returncode == 0, output[-3000:]
    assert "restart 1 of 2 in 5 s" in output and "resuming from" in output
    told = [line["event"] for line in read_history(out) if line["event"] != "saved"]
    assert told == ["started", "failed", "started", "finished"]
    assert complete_checkpoints(out)[-1][0] == 160
