"""DeepSpeed settings: from a JSON file to what DeepSpeed is given, each `auto` resolved from the recipe.

Nothing here imports DeepSpeed, so a wrong setting is found before any rank starts.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from gigatok_ds.config.deepspeed_keys import (
    DECIDED_ELSEWHERE,
    KNOWN_KEYS,
    REPORTING,
    SECTIONS,
    nearest,
    refuse_unsupported,
)
from gigatok_ds.config.recipe import GPTRecipe, Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError

AUTO = "auto"
BUCKET = 50_000_000  # elements that are communicated at once

# What the bundled files of ds_configs are called, and their (stage, offload).
BUNDLED = {"zero0": (0, False), "zero1": (1, False), "zero2": (2, False), "zero3": (3, False),
           "zero3_offload": (3, True)}

# Settings that the recipe decides too, and where.
_RECIPE_KEYS = {
    "train_batch_size": "training.global_batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size / (micro batch x data ranks)",
    "gradient_clipping": "optimizer.max_grad_norm",
    "bf16.enabled": "training.precision",
    "fp16.enabled": "training.precision",
}
_PER_RANK = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def zero_settings(stage: int, *, offload: bool = False) -> dict[str, Any]:
    """The settings of ds_configs/zero{stage}[_offload].json: what `--zero STAGE` stands for.

    offload (stage 3 only) keeps parameters and optimizer state in host memory.
    """
    if (stage, offload) not in BUNDLED.values():
        wanted = f"ZeRO stage {stage}{' with offload' if offload else ''}"
        raise InputError(f"{wanted} is not available; allowed are stages 0 to 3, and offload with stage 3")
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        # At stages 1 and 2 DeepSpeed lets the host wait for the whole device before it reduces a bucket beside the
        # backward pass, and at its end; in order with it, nothing waits. Its default of 5e8 elements a bucket would
        # hold more than the state of the smaller models.
        zero |= {"overlap_comm": stage == 3, "contiguous_gradients": True, "reduce_bucket_size": BUCKET}
    if stage in (1, 2):
        zero |= {"allgather_bucket_size": BUCKET}
    if stage == 3:
        zero |= {"stage3_gather_16bit_weights_on_model_save": False}
    if offload:
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True},
                 "offload_param": {"device": "cpu", "pin_memory": True}}
    settings = {
        "train_batch_size": AUTO,
        "train_micro_batch_size_per_gpu": AUTO,
        "gradient_accumulation_steps": AUTO,
        "gradient_clipping": AUTO,
        "bf16": {"enabled": AUTO},
        "fp16": {"enabled": AUTO},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": AUTO,
    }
    return settings | ({"zero_force_ds_cpu_optimizer": False} if offload else {})


def read_settings(path_or_name: str | Path) -> dict[str, Any]:
    """A DeepSpeed JSON file, or the bundled settings of that name (zero0 ... zero3_offload).

    Raises InputError when it is missing, not a JSON object, or says something twice.
    """
    if str(path_or_name) in BUNDLED:
        stage, offload = BUNDLED[str(path_or_name)]
        return zero_settings(stage, offload=offload)
    try:
        text = Path(path_or_name).read_text(encoding="utf-8-sig")
        settings = json.loads(text, object_pairs_hook=_without_repeats)
    except FileNotFoundError:
        hint = nearest(str(path_or_name), BUNDLED, allowed=BUNDLED)
        raise InputError(f"there is no DeepSpeed settings file {path_or_name}; {hint}") from None
    except (InputError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path_or_name} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path_or_name} is not a JSON object of DeepSpeed settings")
    return settings


def resolve_deepspeed(settings: str | Path | dict[str, Any], recipe: Recipe, *, data_parallel_size: int,
                      source: str | None = None) -> tuple[dict[str, Any], list[str]]:
    """Settings for DeepSpeed with every `auto` filled in, and warnings about those without effect.

    settings is a path, a bundled name or a dictionary; errors call it `source`. What it states must agree with the
    recipe: batch sizes, clipping and precision. Raises InputError naming both sources when it does not, for keys that
    DeepSpeed does not know, and for combinations known to train wrongly.
    """
    source = source or _source(settings)
    given = copy.deepcopy(settings) if isinstance(settings, dict) else read_settings(settings)
    _check_keys(given, source, recipe)
    for key, value in _from_recipe(recipe, data_parallel_size).items():
        section, _, name = key.partition(".")
        holder, last = (_section(given, section, source, create=True), name) if name else (given, section)
        stated = holder.get(last, AUTO)
        if stated != AUTO and stated != value:
            raise InputError(
                f"{source} sets {key} to {stated!r}, but recipe {recipe.name} asks for {value!r} "
                f"({_RECIPE_KEYS[key]}); make them agree, or write {AUTO!r} in the settings"
            )
        holder[last] = value
    zero = _section(given, "zero_optimization", source, create=True)
    zero.setdefault("stage", 0)
    _fill(given, "zero_allow_untested_optimizer", True)
    if any(given.get(key, AUTO) not in (AUTO, None, False) for key in REPORTING):
        _fill(given, "log_level", "info")  # else what was asked for would not be shown
    _fill(given, "steps_per_print", 10**9)  # never: the loop reports
    if zero.get("offload_optimizer"):
        _fill(given, "zero_force_ds_cpu_optimizer", False)
    # In zero_optimization DeepSpeed itself takes "auto" for its default.
    left = [key for key in _auto_keys(given) if not key.startswith("zero_optimization.")]
    if left:
        raise InputError(f"{source}: {left[0]} cannot be {AUTO!r}; give a value or leave it out")
    _refuse_harmful(given, source, recipe)
    refuse_unsupported(given, source, recipe)
    return given, _warnings(given, source)


def check_settings(settings: str | Path | dict[str, Any], recipe: Recipe) -> tuple[dict[str, Any], str]:
    """Settings of which nothing is refused, with `auto` resolved as far as no number of ranks is needed, and what they
    are called.

    Raises InputError as `resolve_deepspeed` does, except for what depends on the number of ranks.
    """
    source = _source(settings)
    given = copy.deepcopy(settings) if isinstance(settings, dict) else read_settings(settings)
    for key in _PER_RANK:
        given.pop(key, None)
    return resolve_deepspeed(given, recipe, data_parallel_size=1, source=source)[0], source


def _source(settings: str | Path | dict[str, Any]) -> str:
    return "the DeepSpeed settings" if isinstance(settings, dict) else str(settings)


def scaler_search(settings: dict[str, Any]) -> int:
    """How many steps in a row fp16's loss scaling may leave out on its way from its initial scale to its lowest, by
    resolved settings; 0 without a scale that is searched for."""
    fp16 = settings["fp16"]
    if not fp16["enabled"] or fp16.get("loss_scale", 0):
        return 0
    halvings = fp16.get("initial_scale_power", 16) - math.log2(fp16.get("min_loss_scale", 1))
    steps: int = math.ceil(halvings) + fp16.get("hysteresis", 2) - 1
    return steps


def zero3_worth_it(parameters: int) -> str | None:
    """Advice against ZeRO-3 for a model of this many parameters; None when it is sensible."""
    if parameters >= 500_000_000:
        return None
    return (f"ZeRO-3 costs time and saves little for a model of {parameters / 1e6:.0f}M parameters; "
            "ZeRO-1 or 2 is faster")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise InputError(f"the key {key!r} appears twice")
    return dict(pairs)


def _check_keys(settings: dict[str, Any], source: str, recipe: Recipe) -> None:
    for key, value in settings.items():
        if key in SECTIONS:
            _section(settings, key, source)
        if key not in KNOWN_KEYS:
            hint = nearest(key, KNOWN_KEYS, allowed=KNOWN_KEYS - DECIDED_ELSEWHERE.keys())
            raise InputError(f"{source}: unknown key {key!r}; {hint}")
        if key in DECIDED_ELSEWHERE:
            reason = DECIDED_ELSEWHERE[key]
            raise InputError(f"{source} has {key!r}; remove it: {reason}{_rival(key, value, recipe)}")


def _rival(key: str, section: Any, recipe: Recipe) -> str:
    """What a refused section and the recipe each say, for the two sections that users do bring along."""
    section = section if isinstance(section, dict) else {}
    params = section.get("params") if isinstance(section.get("params"), dict) else {}
    if key == "optimizer" and "lr" in params:
        return f" (lr here: {params['lr']!r}, in recipe {recipe.name}: {recipe.optimizer.lr!r})"
    if key == "scheduler":
        kind = section.get("type")
        return f" (type here: {kind!r}, kind in recipe {recipe.name}: {recipe.schedule.kind!r})"
    return ""


def _from_recipe(recipe: Recipe, data_parallel_size: int) -> dict[str, Any]:
    training = recipe.training
    micro = training.micro_batch_size or max(training.global_batch_size // data_parallel_size, 1)
    _check_shared_batch(recipe, micro)
    per_step = micro * data_parallel_size
    if training.global_batch_size % per_step:
        raise InputError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of "
            f"{data_parallel_size} data ranks x micro batch {micro}; "
            "change training.global_batch_size, training.micro_batch_size or the number of ranks"
        )
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.global_batch_size // per_step,
        # Always written: left out, DeepSpeed would clip at 1.0. Zero means no clipping.
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "bf16.enabled": training.precision == "bf16",
        "fp16.enabled": training.precision == "fp16",
    }


def _check_shared_batch(recipe: Recipe, micro: int) -> None:
    """The tensor ranks of a data rank share the images of its micro batch."""
    tensor = recipe.parallel.tensor
    if tensor == 1 or (isinstance(recipe, GPTRecipe) and not recipe.data.tokenizer):
        return
    adversarial = recipe.loss.adversarial if isinstance(recipe, TokenizerRecipe) else None
    # The DINO discriminator's batch norm is over that many images, on whichever rank they are.
    unit = 8 * tensor if adversarial and adversarial.discriminator == "dino" else tensor
    if micro % unit:
        raise InputError(f"the micro batch of {micro} images cannot be shared by {tensor} tensor ranks"
                         f"{' in groups of 8, as the dino discriminator needs' if unit > tensor else ''}; "
                         f"choose training.micro_batch_size as a multiple of {unit}")


def _section(settings: dict[str, Any], name: str, source: str, *, create: bool = False) -> dict[str, Any]:
    section = settings.setdefault(name, {}) if create else settings.get(name, {})
    if not isinstance(section, dict):
        raise InputError(f"{source}: {name} is {section!r}; it must be a JSON object")
    return section


def _fill(settings: dict[str, Any], key: str, value: Any) -> None:
    if settings.get(key, AUTO) == AUTO:
        settings[key] = value


def _auto_keys(settings: dict[str, Any], prefix: str = "") -> list[str]:
    found: list[str] = []
    for key, value in settings.items():
        found += _auto_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else (
            [prefix + key] if value == AUTO else [])
    return found


def _refuse_harmful(settings: dict[str, Any], source: str, recipe: Recipe) -> None:
    zero, tensor_ranks = settings["zero_optimization"], recipe.parallel.tensor
    if type(zero["stage"]) is not int or zero["stage"] not in range(4):
        raise InputError(f"{source}: zero_optimization.stage is {zero['stage']!r}; it must be 0, 1, 2 or 3")
    hpz = zero.get("zero_hpz_partition_size", 1)
    if hpz not in (0, 1, AUTO) and tensor_ranks > 1:
        raise InputError(
            f"{source}: zero_hpz_partition_size with tensor parallelism silently mixes weights "
            f"(it is {hpz!r}, with {tensor_ranks} tensor ranks); remove it, or use one tensor rank"
        )
    half = next((name for name in ("bf16", "fp16") if settings[name]["enabled"]), None)
    if zero["stage"] == 0 and half and tensor_ranks > 1:
        raise InputError(f"{source}: ZeRO stage 0 in {half} with tensor parallelism counts cut parameters of one rank "
                         f"only, and so clips by a wrong norm ({tensor_ranks} tensor ranks); use stage 1")
    offloads = [key for key in ("offload_optimizer", "offload_param")
                if isinstance(zero.get(key), dict) and zero[key].get("device", "none") not in ("none", None)]
    if offloads and recipe.optimizer.kind == "muon":
        raise InputError(f"{source}: zero_optimization.{offloads[0]} keeps in host memory what optimizer.kind muon "
                         "puts together from all ranks in an update; remove it, or use optimizer.kind adamw")
    if zero.get("offload_optimizer") and settings["zero_force_ds_cpu_optimizer"]:
        raise InputError(f"{source}: zero_force_ds_cpu_optimizer must be false: AdamW is torch's here")


def _warnings(settings: dict[str, Any], source: str) -> list[str]:
    zero = settings["zero_optimization"]
    warnings = []
    if zero["stage"] < 3 and "offload_param" in zero:
        warnings.append(f"{source}: zero_optimization.offload_param does nothing below ZeRO stage 3")
    if zero["stage"] == 0 and settings["bf16"]["enabled"]:
        warnings.append(f"{source}: bf16 is less precise at ZeRO stage 0 than above; prefer stage 1")
    return warnings
