"""A hostfile job on two nodes (network namespaces of this machine, see two_nodes.sh) is the job of one node.

Needs root and the Debian packages that two_nodes.sh names; skipped without them. Run with: pytest -m slow
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import HELPERS, ROOT
from saved_runs import read_weights
from training_runs import LAUNCHER, partitioning, prepare

from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.cluster.local_job import free_port
from gigatok_ds.config.load import load_recipe
from gigatok_ds.monitoring.metrics import of_the_machine, read_metrics

pytestmark = pytest.mark.slow

TWO_NODES = HELPERS / "two_nodes.sh"
IMPOSSIBLE = 77
PARTS = {"tokenizer": "generator", "gpt": "gpt"}
SECONDS = 900
ENV_FILE = "# of both nodes\nDS_ACCELERATOR=cpu\n\nGLOO_SOCKET_IFNAME=eth0\n"


def run(command, folder, **variables):
    """(exit code, all it printed) of a command run in `folder`; ended, with what it started, after SECONDS."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TWO_NODES_SECONDS": str(SECONDS),
                                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    environment = {name: value for name, value in environment.items() if name != "GLOO_SOCKET_IFNAME"} | variables
    with subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          cwd=folder, env=environment, start_new_session=True) as process:
        try:
            output, _ = process.communicate(timeout=SECONDS + 60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
    return process.returncode, output


@pytest.fixture(scope="module", autouse=True)
def possible(tmp_path_factory):
    code, output = run([TWO_NODES, "true"], tmp_path_factory.mktemp("possible"))
    if code == IMPOSSIBLE:
        pytest.skip(output.strip().splitlines()[-1])
    assert code == 0, output


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_nodes")
    (folder / ".deepspeed_env").write_text(ENV_FILE)
    (folder / "zero3.json").write_text(json.dumps(partitioning(3)))
    return folder, prepare(folder)


def check_cluster(folder, out, *arguments):
    """check-cluster on node-a; `out` may name $NODE_LOCAL, the directory that the nodes do not share."""
    words = [sys.executable, "-m", "gigatok_ds", "check-cluster", *arguments]
    script = f'"$@" --hostfile "$HOSTFILE" --out "{out}"'
    return run([TWO_NODES, "bash", "-c", script, "_", *words], folder, PYTHONPATH=str(ROOT))


def rows(output):
    return {line.split()[0]: line.split() for line in output.splitlines() if line.startswith("node-")}


def test_the_preflight_finds_both_nodes_well(prepared):
    folder, _ = prepared
    code, output = check_cluster(folder, folder / "runs" / "new", "--recipe", folder / "gpt.yaml")
    assert code == 0 and "no problem found" in output, output
    assert {name: (row[1], *row[-2:]) for name, row in rows(output).items()} == {
        "node-a": ("2", "ok", "ok"), "node-b": ("2", "ok", "ok")}
    assert not (folder / "runs").exists() and not list(folder.glob(".check*"))


def test_the_preflight_names_what_would_hang(prepared, tmp_path):
    """Without .deepspeed_env, gloo announces the address of the node's own name, which is a loopback address."""
    code, output = check_cluster(tmp_path, "$NODE_LOCAL/runs", "--timeout", "45")
    problems = [line for line in output.splitlines() if line.startswith("problem: ")]
    assert code == 1 and len(problems) == 2, output
    assert problems[0].startswith("problem: node-b: ") and "--out must be on a" in problems[0]
    assert "gloo could not sum over them" in problems[1] and "GLOO_SOCKET_IFNAME" in problems[1]


@pytest.mark.parametrize("kind", ["tokenizer", "gpt"])
def test_two_nodes_train_what_one_node_trains(prepared, kind):
    """tp=2 x dp=2 under ZeRO-3. The ranks do the same sums in the same order: every figure is equal, bit for bit."""
    folder, data = prepared
    arguments = [f"{kind}.yaml", "--deepspeed", "zero3.json", "--tp", "2", *data[kind]]
    two, one = folder / f"{kind} on 2 nodes, 100%n", folder / f"{kind}-on-one"

    port = {"MASTER_PORT": str(free_port())}
    code, output = run([TWO_NODES, LAUNCHER, *arguments, "--out", two], folder, **port)
    assert code == 0, output
    assert {line.partition(":")[0] for line in output.splitlines() if "exits successfully" in line} == {
        "node-a", "node-b"}
    code, output = run([LAUNCHER, *arguments, "--out", one], folder, GPUS="4", DS_ACCELERATOR="cpu", **port)
    assert code == 0, output

    assert figures(two) == figures(one)
    assert [line["step"] for line in figures(two) if "loss" in line] == list(range(1, 9))
    assert sorted(os.listdir(two / "checkpoints")) == ["latest", "step-0000004", "step-0000008"]
    model = build_on_meta(load_recipe(folder / f"{kind}.yaml", data[kind]).model)
    part = Path("checkpoints", "step-0000008", PARTS[kind])
    ours, theirs = read_weights(two / part), read_weights(one / part)
    assert ours.keys() == theirs.keys() == model.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def figures(run_dir):
    """The lines of metrics.jsonl without what the machine says of itself."""
    return [{name: value for name, value in line.items() if not of_the_machine(name)} for line in read_metrics(run_dir)]
