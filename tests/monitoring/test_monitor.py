"""What a run leaves behind while it trains: metrics, events, environment; also when killed and resumed."""

import getpass
import json
import math
import subprocess

import numpy as np
import pytest

from gigatok_ds.errors import InputError
from gigatok_ds.monitoring.metrics import Monitor, read_metrics
from gigatok_ds.training import environment
from gigatok_ds.training.environment import anonymise, git_state, write_environment


def run(directory, start, stop, *, every=2, loss=float, **arguments):
    arguments = {"enabled": True, "total_steps": 10, "start_step": start, "description": "demo"} | arguments
    with Monitor(directory, **arguments) as monitor:
        for step in range(start + 1, stop + 1):
            if step % every == 0:
                monitor.log(step, {"loss": loss(step), "lr": np.float32(0.5)})
                monitor.progress(step, {"loss": loss(step)})


def events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory / "events"), size_guidance={"scalars": 0, "images": 0})
    return accumulator.Reload()


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    with Monitor(tmp_path / "new" / "run", enabled=True, total_steps=10, description="demo") as monitor:
        monitor.log(1, {"loss": 2.5, "psnr": 20})
        text = (tmp_path / "new" / "run" / "metrics.jsonl").read_text()
        line = json.loads(text)
        assert text.endswith("\n") and list(line) == ["step", "time", "loss", "psnr"]
        assert line["step"] == 1 and line["loss"] == 2.5 and line["time"] > 1.7e9
        monitor.log(1, {"validation/loss": 3.0})
        assert [entry["step"] for entry in read_metrics(tmp_path / "new" / "run")] == [1, 1]


def test_other_ranks_touch_nothing(tmp_path):
    run(tmp_path / "run", 0, 4, enabled=False)
    with Monitor(tmp_path / "run", enabled=False, total_steps=1, description="demo") as monitor:
        monitor.image(1, "image", np.zeros((4, 4, 3), np.uint8))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rubbish", ['{"step": 8, "ti', '{"step": 8', '{"step": 8, "a": 1}', "\0\0", "[1]"])
def test_resuming_drops_later_steps_and_a_half_written_line(tmp_path, rubbish):
    run(tmp_path, 0, 8)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(rubbish)
    before = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    run(tmp_path, 5, 10, loss=lambda step: -float(step))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    assert lines[:2] == before[:2] and [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8, 10]
    assert [line["loss"] for line in read_metrics(tmp_path)] == [2, 4, -6, -8, -10]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "events"}


def test_a_complete_last_line_without_its_end_is_kept(tmp_path):
    run(tmp_path, 0, 4)
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    run(tmp_path, 4, 6)
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4, 6]


def test_starting_again_from_nothing_drops_everything(tmp_path):
    run(tmp_path, 0, 6)
    run(tmp_path, 0, 4, loss=lambda step: 7.0)
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(2, 7.0), (4, 7.0)]


def test_tensorboard_shows_each_step_once(tmp_path):
    run(tmp_path, 0, 8)
    run(tmp_path, 5, 10, loss=lambda step: -float(step))
    scalars = events(tmp_path).Scalars("loss")
    logged = [(scalar.step, scalar.value) for scalar in scalars]
    assert logged == [(2, 2), (4, 4), (6, -6), (8, -8), (10, -10)]


def test_images_reach_tensorboard(tmp_path):
    with Monitor(tmp_path, enabled=True, total_steps=10, description="demo") as monitor:
        monitor.image(3, "samples", np.full((6, 4, 3), 9, np.uint8))
        with pytest.raises(AssertionError):
            monitor.image(3, "samples", np.zeros((6, 4, 3)))
    (image,) = events(tmp_path).Images("samples")
    assert (image.step, image.height, image.width) == (3, 6, 4)


def test_damage_elsewhere_is_reported(tmp_path):
    run(tmp_path, 0, 8)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], lines[1][:9] + "\n", *lines[2:]]))
    damaged = path.read_text()
    for use in (lambda: read_metrics(tmp_path), lambda: run(tmp_path, 8, 10)):
        with pytest.raises(InputError, match=r"line 2 of .*metrics.jsonl is damaged"):
            use()
    assert path.read_text() == damaged


def test_readers_ignore_the_line_being_written_and_missing_files_are_named(tmp_path):
    run(tmp_path, 0, 4)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 4]
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "elsewhere")


def test_what_is_not_finite_is_valid_json_and_comes_back_as_nan(tmp_path):
    with Monitor(tmp_path, enabled=True, total_steps=1, description="demo") as monitor:
        monitor.log(1, {"a": math.nan, "b": math.inf, "c": 1.0})

    def refuse(constant):
        raise AssertionError(constant)

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line["a"] is None and line["b"] is None and line["c"] == 1.0
    (line,) = read_metrics(tmp_path)
    assert math.isnan(line["a"]) and math.isnan(line["b"]) and line["c"] == 1.0


def test_the_bar_continues_where_the_run_stopped(tmp_path, capsys):
    run(tmp_path, 6, 10)
    output = capsys.readouterr()
    assert output.out == "" and "demo:  60%" in output.err and "6/10" in output.err
    assert "10/10" in output.err and "loss=10" in output.err


def test_an_error_closes_everything(tmp_path):
    with pytest.raises(RuntimeError), Monitor(tmp_path, enabled=True, total_steps=2, description="demo") as monitor:
        monitor.log(1, {"loss": 1.0})
        raise RuntimeError
    with pytest.raises(ValueError, match="closed file"):
        monitor.log(2, {"loss": 1.0})


def test_environment_names_versions_and_no_people(tmp_path, monkeypatch):
    home = tmp_path / "homes" / "ada"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(getpass, "getuser", lambda: "ada")
    command = [f"{home}/venv/bin/gigatok-ds", "train", "--out", f"{home}/runs/a",
               "data.train=/scratch/ada/shards", f'data.validation="{home}"', "/home/bob/x", "--name=ada"]
    write_environment(tmp_path, command=command)
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["command"] == ["gigatok-ds", "train", "--out", "~/runs/a",
                                  "data.train=/scratch/<user>/shards", 'data.validation="~"',
                                  "/home/<user>/x", "--name=ada"]
    import torch

    packages = content["packages"]
    assert torch.__version__.startswith(packages["torch"]) and packages["numpy"] == np.__version__
    assert set(packages) == set(environment.PACKAGES)
    assert len(content["cuda_devices"]) == torch.cuda.device_count()
    assert content["python"].startswith("3.") and content["time"].endswith("+00:00")
    assert [path.name for path in tmp_path.iterdir()] == ["environment.json"]
    write_environment(tmp_path, command=["/usr/lib/gigatok_ds/__main__.py", "demo"])
    content = json.loads((tmp_path / "environment.json").read_text())
    assert content["command"] == ["python -m gigatok_ds", "demo"]


def test_a_package_that_is_not_installed_has_no_version(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "surely-not-installed"))
    write_environment(tmp_path, command=["x"])
    packages = json.loads((tmp_path / "environment.json").read_text())["packages"]
    assert packages == {"numpy": np.__version__, "surely-not-installed": None}


@pytest.mark.parametrize("home, argument, expected", [
    ("/h/me", "/h/me", "~"),
    ("/h/me/", "/h/me/x", "~/x"),
    ("/h/me", "/h/mercury/x", "/h/mercury/x"),
    ("/h/me", "/data/h/me/x", "/data/h/me/x"),
    ("/", "/x/y", "/x/y"),
])
def test_only_the_home_directory_becomes_a_tilde(monkeypatch, home, argument, expected):
    monkeypatch.setenv("HOME", home)
    monkeypatch.setattr(getpass, "getuser", lambda: "nobody-here")
    assert anonymise(argument) == expected


def test_a_user_without_a_name_is_fine(monkeypatch):
    def nameless():
        raise OSError("no such user")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert anonymise("/x/y") == "/x/y"


def test_git_state_counts_tracked_files_only(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    for name in [name for name in environment.os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    package, installed = tmp_path / "package", tmp_path / "venv" / "package"
    for folder in (package, installed):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
    assert git_state(package) == (None, None)
    git("init", "--quiet")
    git("add", "package")
    assert git_state(package) == (None, None), "nothing is committed yet"
    git("commit", "--quiet", "-m", "first")
    commit = git("rev-parse", "HEAD")
    assert git_state(package) == (commit, False)
    (package / "__init__.py").write_text("x = 1\n")
    assert git_state(package) == (commit, True)
    assert git_state(installed) == (None, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(package) == (None, None), "git is not installed"
