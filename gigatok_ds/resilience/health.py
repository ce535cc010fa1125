"""Is what is about to be saved, or trained on, worth it? Weights must be finite, and alike where ranks hold the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gigatok_ds.checkpoint.run_directory import complete_checkpoints
from gigatok_ds.engine.engine import Engine
from gigatok_ds.errors import InputError, MachineError
from gigatok_ds.parallel.drift import compare_replicas
from gigatok_ds.parallel.topology import Topology


def check_health(engines: Mapping[str, Engine], step: int, run_dir: Path, topology: Topology) -> None:
    """Raise, on all ranks, InputError for weights that are not finite and MachineError for ranks that differ.
    Collective.
    """
    for name, engine in engines.items():
        if not all(topology.gather_objects(engine.weights_finite())):
            raise InputError(f"step {step}: weights of the {name} are not finite; {_newest(run_dir)}: lower "
                             "optimizer.lr")
        try:
            compare_replicas(engine.replicated(), topology)
        except MachineError as error:
            raise MachineError(
                f"step {step}: of the {name}, {error}; {_newest(run_dir)}, which is from before"
            ) from None


def _newest(run_dir: Path) -> str:
    found = complete_checkpoints(run_dir)
    return f"the newest checkpoint is {found[-1][1]}" if found else "nothing is saved"
