"""Which data a run is about: the order of its samples is a function of their index, so that must stay the same,
wherever it lies.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from gigatok_ds.checkpoint.run_directory import DATA_FILE
from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.parallel.topology import Topology
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import brief, read_json

_CONSEQUENCE = {"train": ", and so would the order of samples", "tokenizer": ", and so would the codes",
                "codes": ", which are another tokenizer's",
                "validation": ", and its figures would not compare"}


def check_identity(identity: Mapping[str, str], run_dir: Path, topology: Topology, since: Path | None = None) -> None:
    """Compare what tells the data from any other (SHA-256 by setting below `data`) with what the run began with.
    Collective.

    Raises InputError, on all ranks, when ranks see different data or the run began with others; so did one that is a
    branch of the run in the directory `since`.
    """
    identity = dict(identity)
    differs = topology.from_first(identity) != identity
    if topology.max_over_ranks(float(differs)):
        raise InputError("data.train is not the same on all hosts, or other data is not: their copies, or their "
                         "indices, differ"
                         if not differs else f"data.train is not on host {os.uname().nodename} what it is on the "
                                             "first, or other data is not: copies, or indices, differ; give all hosts "
                                             "the same")
    recorded = next((folder / DATA_FILE for folder in (run_dir, since) if folder and (folder / DATA_FILE).is_file()),
                    None)
    problem = _compare(identity, recorded) if topology.is_first and recorded else None
    if problem := topology.from_first(problem):
        raise InputError(problem)


def write_identity(identity: Mapping[str, str], run_dir: Path) -> None:
    """Write data.json."""
    write_atomically(run_dir / DATA_FILE, (json.dumps(_record(identity), indent=2) + "\n").encode())


def _record(identity: Mapping[str, str]) -> dict[str, str]:
    return {f"{name}_sha256": digest for name, digest in identity.items()}


def _compare(identity: dict[str, str], recorded: Path) -> str | None:
    """What is wrong with the data, or nothing."""
    now = _record(identity)
    try:
        earlier = from_plain(dict[str, str], read_json(recorded), recorded.name)
        earlier["train_sha256"]
    except (InputError, KeyError) as error:
        return f"{recorded} is damaged ({brief(error)}); remove it if data.train is what the run began with"
    for name in identity:
        key = f"{name}_sha256"
        if earlier.get(key, now[key]) != now[key]:
            return (f"data.{name} is not what {recorded.parent} began with: its content has "
                    f"changed{_CONSEQUENCE.get(name, '')}; give it the same, or begin another run (--out)")
    return None
