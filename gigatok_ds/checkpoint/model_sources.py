"""A model to convert, wherever it is: in a training run, in a standalone directory, in an original `.pt`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gigatok_ds.checkpoint.class_names import CLASSES_FILE, read_classes
from gigatok_ds.checkpoint.fragments import EMA, WEIGHTS, SavedEngine
from gigatok_ds.checkpoint.original import from_original, read_original
from gigatok_ds.checkpoint.run_directory import (
    DATA_FILE,
    MODEL_PARTS,
    RECIPE_FILE,
    checkpoint_path,
    complete_checkpoints,
    damaged_file,
    newest_checkpoint,
    read_state,
)
from gigatok_ds.checkpoint.standalone import described_config, known_codes, lazy_weights, read_config
from gigatok_ds.checkpoint.tensor_files import LazyTensors, check_size, shapes_of
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.lora import LoRAConfig
from gigatok_ds.config.model import GPTConfig, TokenizerConfig
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.errors import InputError
from gigatok_ds.models.tuning import adapter_names, is_adapters, merged_weight
from gigatok_ds.untrusted import read_json


@dataclass(frozen=True, kw_only=True)
class Model:
    """weights are a state_dict of the network that `config` describes, read a tensor at a time; classes are the names
    of its classes, where they are known; place is where it was found, checkpoint that of a run."""

    config: TokenizerConfig | GPTConfig
    weights: Mapping[str, Tensor]
    provenance: dict[str, Any]
    classes: Sequence[str] = ()
    place: Path | None = None
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        """Raises InputError when the weights are too few for such a model: before it is built."""
        check_size(self.config, shapes_of(self.weights), "the description of the model")

    @property
    def kind(self) -> str:
        return "tokenizer" if isinstance(self.config, TokenizerConfig) else "gpt"


def is_run(path: Path) -> bool:
    """A run directory, or one checkpoint of it; standalone models may lie in a directory called checkpoints, too."""
    of_a_run = path.parent.name == "checkpoints" and path.name.startswith("step-")
    return of_a_run or (path / "checkpoints").is_dir() or (path / RECIPE_FILE).is_file()


def open_model(path: Path, *, choice: str | None = None, recipe: Recipe | None = None,
               step: int | None = None) -> Model:
    """The model at `path`.

    choice is "ema", "model" or None for what is usual. recipe says what an original `.pt` is of. step chooses a
    checkpoint of a run; None is the newest. Raises InputError when it is none of these, damaged, or an option does not
    apply.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file():
        if recipe is None:
            raise InputError(f"{path} does not say what it is a checkpoint of; give --recipe, such as --recipe "
                             "VQ_SS256")
        if step is not None:
            raise InputError(f"--step chooses a checkpoint of a run; {path} is a file")
        return open_original(path, recipe.model, choice, name=recipe.name)
    if is_run(path):
        return open_run(path, choice=choice, step=step)
    if choice or step is not None:
        option = "--weights" if choice else "--step"
        raise InputError(f"{option} chooses from what a run or a .pt holds; {path} holds one set of weights")
    description = read_config(path)
    return Model(config=described_config(path, description["kind"]), weights=lazy_weights(path),
                 provenance=description["provenance"], classes=description["classes"], place=path)


def open_original(path: Path, config: TokenizerConfig | GPTConfig, choice: str | None = None, *,
                  name: str | None = None) -> Model:
    """The model of an original `.pt`, of that configuration; name is that of its recipe."""
    weights = read_original(path, choice, kind="tokenizer" if isinstance(config, TokenizerConfig) else "gpt")
    config, ours = from_original(config, weights, str(path))
    return Model(config=config, weights=ours, place=path,
                 provenance={"recipe": name, "source": path.name, "weights": choice or "default"})


def open_run(path: Path, *, choice: str | None = None, step: int | None = None) -> Model:
    """The trained model of a run directory's checkpoint, or of one checkpoint, once its files are as they were written.

    By default the newest, and the moving average where the run kept one. Adapters (`training.lora`) are merged into
    the weights beside them; of a moving average they are averages.
    """
    checkpoint = _checkpoint(path, step)
    recipe_file, classes_file = (_beside(checkpoint, name) for name in (RECIPE_FILE, CLASSES_FILE))
    if recipe_file is None:
        raise InputError(f"{path} is not a training run: it has no {RECIPE_FILE}")
    recipe = load_recipe(str(recipe_file))
    state, part = read_state(checkpoint), MODEL_PARTS[recipe.kind]
    problem = damaged_file(checkpoint, state, part)
    if problem:
        raise InputError(f"{problem}; restore it from a copy, or convert another checkpoint (--step)")
    saved = SavedEngine(checkpoint / part)
    choice = choice or ("ema" if saved.has(EMA) else "model")
    if choice == "ema" and not saved.has(EMA):
        raise InputError(f"{checkpoint} holds no averaged weights: the run had training.ema_decay=null")
    provenance = {"recipe": recipe.name, "checkpoint": checkpoint.name, "weights": choice, "metrics": state.metrics}
    if codes := _codes_of(_beside(checkpoint, DATA_FILE)):
        provenance["codes_sha256"] = codes
    weights = saved.tensors(EMA if choice == "ema" else WEIGHTS)
    if lora := recipe.training.lora:
        weights, provenance["lora"] = merged(weights, lora), asdict(lora)
    return Model(config=recipe.model, weights=weights, provenance=provenance,
                 classes=read_classes(classes_file) if classes_file else (), place=path, checkpoint=checkpoint)


def merged(weights: Mapping[str, Tensor], lora: LoRAConfig) -> LazyTensors:
    """The state_dict of a GPT without adapters that computes what it does with them; each tensor made when asked for.
    """
    def read(name: str) -> Tensor:
        into, out_of = adapter_names(name)
        if into not in weights:
            return weights[name]
        return merged_weight(weights[name], weights[into], weights[out_of], lora.scale)

    return LazyTensors({name: shape for name, shape in shapes_of(weights).items() if not is_adapters(name)}, read)


def _codes_of(record: Path | None) -> str | None:
    """What tells the codes that a GPT was trained on from those of other tokenizers, if its run has written it down."""
    return None if record is None else known_codes(read_json(record))


def _beside(checkpoint: Path, name: str) -> Path | None:
    """A file of a checkpoint or, if it has none of that name, of its run."""
    return next((folder / name for folder in (checkpoint, checkpoint.parent.parent) if (folder / name).is_file()), None)


def _checkpoint(path: Path, step: int | None) -> Path:
    if (path / "checkpoints").is_dir() or not path.name.startswith("step-"):
        if step is None:
            return newest_checkpoint(path)
        if step not in dict(complete_checkpoints(path)):
            held = ", ".join(str(number) for number, _ in complete_checkpoints(path)) or "none"
            raise InputError(f"{path} holds no complete checkpoint of step {step}; there are {held}")
        return checkpoint_path(path, step)
    if step is not None:
        raise InputError(f"--step chooses a checkpoint of a run; {path} is one already")
    return path
