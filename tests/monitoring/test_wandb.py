"""Weights & Biases: refused when it is not there, and one run however often training is resumed."""

import importlib.util
import json
import tempfile

import numpy as np
import pytest
from training_runs import prepare

from gigatok_ds.config.load import load_recipe
from gigatok_ds.errors import InputError
from gigatok_ds.monitoring import wandb_log
from gigatok_ds.monitoring.metrics import Monitor
from gigatok_ds.training.run_checks import check_run


def test_a_missing_package_is_refused_before_anything_starts(tmp_path, monkeypatch):
    data = prepare(tmp_path)["gpt"]
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec",
                        lambda name, *more: None if name == "wandb" else found(name, *more))
    check_run(load_recipe(tmp_path / "gpt.yaml", data), tmp_path / "run")
    with pytest.raises(InputError, match=r"monitor.wandb_project is codes, but .* pip install wandb"):
        check_run(load_recipe(tmp_path / "gpt.yaml", [*data, "monitor.wandb_project=codes"]), tmp_path / "run")


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is optional")
def test_a_resumed_run_continues_its_own(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    # Wandb's own directories stay where pytest-xdist ends a worker.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for start in (0, 1):
        run = wandb_log.wandb_run("demo", tmp_path, name="a run", recipe={"training": {"steps": 2}})
        with Monitor(tmp_path, enabled=True, total_steps=2, start_step=start, description="demo", wandb=run) as monitor:
            monitor.log(start + 1, {"loss/total": 2.5})
            monitor.image(start + 1, "preview", np.zeros((4, 4, 3), np.uint8))
            monitor.warn(start + 1, "mind the gap")
    importlib.import_module("wandb").teardown()  # its process
    name = (tmp_path / "wandb_id").read_text().strip()
    runs = list((tmp_path / "wandb").glob("offline-run-*"))
    # Both starts may fall into one second, and then share a directory or get a number behind the name.
    assert runs and all(folder.name.split("-")[3] == name for folder in runs)
    logged = b"".join(path.read_bytes() for path in (tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert all(text in logged for text in (b"loss/total", b"mind the gap", b"preview", b"training"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 1, 2, 2] and lines[1]["warning"] == "mind the gap"
