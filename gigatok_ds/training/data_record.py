"""Which data a run trains on: the order of its samples is a function of their index, so that must stay the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import brief, read_json

DATA_FILE = "data.json"


def record_data(identity: str, run_dir: Path, topology: Topology) -> None:
    """Write data.json, with what tells the training data from any other. Collective.

    Raises InputError, on all ranks, when ranks see different data or the run began with others.
    """
    differs = topology.from_first(identity) != identity
    if topology.max_over_ranks(float(differs)):
        raise InputError("data.train is not the same on all hosts: their copies, or their indices, differ" if not differs
                         else f"data.train is not on host {os.uname().nodename} what it is on the first: copies, or "
                              "indices, differ; give all hosts the same")
    problem = _compare(identity, run_dir / DATA_FILE) if topology.is_first else None
    if problem := topology.from_first(problem):
        raise InputError(problem)


def _compare(identity: str, path: Path) -> str | None:
    """What is wrong, or nothing: then it is written down."""
    try:
        earlier = from_plain(dict[str, str], read_json(path), path.name)["train_sha256"] if path.is_file() else identity
    except (InputError, KeyError) as error:
        return f"{path} is damaged ({brief(error)}); remove it if data.train is what the run began with"
    if earlier != identity:
        return (f"data.train is not what {path.parent} began with: its shards or classes have changed, and so would the "
                "order of samples; give it the same, or continue into another --out by --branch-from")
    write_atomically(path, (json.dumps({"train_sha256": identity}, indent=2) + "\n").encode())
    return None
