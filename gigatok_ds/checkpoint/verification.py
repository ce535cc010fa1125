"""Whether what was written is what it was made from: every tensor, and what the model makes of fixed inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from gigatok_ds.checkpoint.model_sources import Model, is_run
from gigatok_ds.checkpoint.original import build_on_meta, written_specs
from gigatok_ds.checkpoint.run_directory import RECIPE_FILE
from gigatok_ds.checkpoint.tensor_files import Spec
from gigatok_ds.config.load import load_recipe
from gigatok_ds.config.model import TokenizerConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.npy_files import read_npz
from gigatok_ds.untrusted import reading

# Of float32 pixels and logits: a training run computes in batches of another size.
PROBE_TOLERANCE = 1e-5


def verify(source: Model, written: Model, *, dtype: torch.dtype | None = None, probe: Path | None = None) -> str:
    """Compare two places of one model, whose parameters are rounded to dtype in the second; says what was compared.

    Tensors are compared one at a time, bit for bit; then both models are built, one after the other, and their outputs
    for the same inputs are, too. probe, if given, holds outputs of the model in training. Raises InputError at a
    difference.
    """
    specs = written_specs(build_on_meta(source.config), dtype)
    for name, spec in specs.items():
        if not _same_bits(_rounded(source.weights[name], spec), _rounded(written.weights[name], spec)):
            raise InputError(f"verification failed: {name} was not written as it was read")
    outputs = [_outputs(model, specs, _inputs(model)) for model in (source, written)]
    for name, value in outputs[0].items():
        if not _same_bits(value, outputs[1][name]):
            raise InputError(f"verification failed: the written model gives other {name} for the same input")
    said = f"{len(specs)} tensors and {' and '.join(outputs[0])} are equal bit for bit"
    return said + (_compare_with_probe(written, specs, probe) if probe else "")


def training_outputs(model: Model, dtype: torch.dtype) -> Path | None:
    """The file of what the model in training gave, if its run wrote that for these very weights, in float32."""
    place = model.place
    if place is None or place.is_file() or not is_run(place):
        return None
    if model.provenance.get("weights") != "model" or dtype != torch.float32:
        return None
    run_dir = place if (place / "checkpoints").is_dir() else place.parent.parent
    if not (run_dir / RECIPE_FILE).is_file():
        return None  # a checkpoint that was copied out of its run
    training = load_recipe(str(run_dir / RECIPE_FILE)).training
    outputs = run_dir / "probe.npz"
    last = model.provenance["checkpoint"] == f"step-{training.steps:07d}"
    return outputs if last and training.precision == "fp32" and outputs.is_file() else None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Unlike torch.equal, NaN is itself and -0 is not 0."""
    bits = [value.contiguous().reshape(-1).view(torch.uint8) for value in (one, other)]
    return one.dtype == other.dtype and torch.equal(*bits)


def _rounded(value: Tensor, spec: Spec) -> Tensor:
    return value.to(spec.dtype)


def network_of(model: Model, specs: Mapping[str, Spec] | None = None) -> Tokenizer | GPT:
    """A model in float32, in evaluation mode; `specs` are of weights as they are written."""
    network = build_on_meta(model.config)
    usual = written_specs(network)
    state = {name: _rounded(model.weights[name], spec).to(usual[name].dtype) for name, spec in (specs or usual).items()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


def _inputs(model: Model) -> dict[str, Tensor]:
    draw, config = torch.Generator().manual_seed(0), model.config
    if isinstance(config, TokenizerConfig):
        return {"images": torch.rand(2, 3, config.image_size, config.image_size, generator=draw) * 2 - 1}
    return {"codes": torch.randint(config.vocab_size, (2, config.sequence_length), generator=draw),
            "classes": torch.randint(config.num_classes, (2,), generator=draw)}


@torch.no_grad()
def _outputs(model: Model, specs: Mapping[str, Spec], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    network = network_of(model, specs)
    if isinstance(network, GPT):
        return {"logits": network(inputs["codes"][:, :-1], inputs["classes"])}
    codes = network.encode(inputs["images"])
    return {"codes": codes, "reconstruction": network.decode(codes)}


def _compare_with_probe(model: Model, specs: Mapping[str, Spec], probe: Path) -> str:
    """The codes must be those of the model in training; pixels and logits to PROBE_TOLERANCE, or to as much of the
    largest: merged adapters round otherwise than adapters do.
    """
    expected = {name: torch.from_numpy(value) for name, value in read_npz(probe).items()}
    with reading(probe, "the run it comes from writes it again"):
        found = _outputs(model, specs, expected)
        theirs_of = {name: expected[name] for name in found}
    for name, value in found.items():
        theirs = theirs_of[name]
        most = PROBE_TOLERANCE * theirs.abs().max().clamp(min=1.0)
        same = torch.equal(value, theirs) if name == "codes" else (value - theirs).abs().max() <= most
        if not same:
            raise InputError(f"verification failed: the written model gives other {name} than in training ({probe})")
    return f", and what the model in training gave ({probe.name})"
