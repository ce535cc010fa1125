"""DeepSpeed settings: from a JSON file to what DeepSpeed is given, with every `auto` resolved from the recipe.

Nothing here imports DeepSpeed, so a wrong setting is found before any rank starts.
"""

from __future__ import annotations

import copy
import difflib
import json
from pathlib import Path

from gigatok_ds.config.recipe import Recipe
from gigatok_ds.errors import InputError

AUTO = "auto"

# Top-level keys of DeepSpeed 0.19 that make sense here. Its optimizer and scheduler sections do not: recipes say that.
KNOWN_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization", "zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "bf16", "fp16", "data_types",
    "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "communication_data_type",
    "seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients",
    "disable_allgather", "checkpoint", "flops_profiler", "comms_logger", "aio", "activation_checkpointing", "compile",
})


def zero_settings(stage: int, *, offload: bool = False) -> dict:
    """The settings of ds_configs/zero{stage}[_offload].json: what `--zero STAGE` stands for.

    offload (stage 3) keeps parameters and optimizer state in host memory.
    """
    zero: dict = {"stage": stage}
    if stage >= 1:
        zero |= {"overlap_comm": True, "contiguous_gradients": True}
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


def read_settings(path: str | Path) -> dict:
    """A DeepSpeed JSON file. Raises InputError when it is missing or not a JSON object."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"there is no DeepSpeed settings file {path}; ds_configs holds some, or use --zero") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is not a JSON object of DeepSpeed settings")
    return settings


def resolve_deepspeed(settings: str | Path | dict, recipe: Recipe, *, data_parallel_size: int,
                      tensor_parallel_size: int = 1) -> tuple[dict, list[str]]:
    """Settings for DeepSpeed with every `auto` filled in, and warnings about those that will do nothing.

    What a file states must agree with the recipe: batch sizes, clipping and precision. Raises InputError naming both
    sources when it does not, for keys that DeepSpeed does not know, and for combinations known to train wrongly.
    """
    source = "the DeepSpeed settings" if isinstance(settings, dict) else str(settings)
    given = copy.deepcopy(settings) if isinstance(settings, dict) else read_settings(settings)
    _refuse_unknown(given, source)
    wanted = _from_recipe(recipe, data_parallel_size)
    for key, value in wanted.items():
        section, _, name = key.partition(".")
        holder, last = (given.setdefault(section, {}), name) if name else (given, section)
        stated = holder.get(last, AUTO)
        if stated != AUTO and stated != value:
            raise InputError(f"{source} sets {key} to {stated}, but recipe {recipe.name} asks for {value}; "
                             f"make them agree, or write {AUTO!r} in the settings")
        holder[last] = value
    given.setdefault("zero_allow_untested_optimizer", True)
    given.setdefault("zero_optimization", {"stage": 0})
    left = [key for key in _auto_keys(given) if not key.startswith("zero_optimization")]
    if left:
        raise InputError(f"{source}: {left[0]} cannot be {AUTO!r}; give a value or leave it out")
    return given, _check_combinations(given, source, tensor_parallel_size)


def _from_recipe(recipe: Recipe, data_parallel_size: int) -> dict:
    training = recipe.training
    micro = training.micro_batch_size or training.global_batch_size // data_parallel_size
    per_step = micro * data_parallel_size
    if micro < 1 or training.global_batch_size % per_step:
        raise InputError(
            f"training.global_batch_size {training.global_batch_size} is not a multiple of {data_parallel_size} data "
            f"ranks x micro batch {max(micro, 1)}; change training.global_batch_size or training.micro_batch_size"
        )
    return {
        "train_batch_size": training.global_batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": training.global_batch_size // per_step,
        # Always written: left out, DeepSpeed would clip at 1.0. Zero means no clipping.
        "gradient_clipping": recipe.optimizer.max_grad_norm,
        "bf16.enabled": training.precision == "bf16",
        "fp16.enabled": training.precision == "fp16",
        # DeepSpeed's own progress lines: never; the loop reports.
        "steps_per_print": 10**9,
    }


def _refuse_unknown(settings: dict, source: str) -> None:
    for key in settings:
        if key in ("optimizer", "scheduler"):
            own = "schedule" if key == "scheduler" else key
            raise InputError(f"{source} has a section {key!r}; remove it: the recipe's {own} decides")
        if key not in KNOWN_KEYS:
            near = difflib.get_close_matches(key, KNOWN_KEYS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(KNOWN_KEYS))}"
            raise InputError(f"{source}: unknown key {key!r}; {hint}")


def _auto_keys(settings: dict, prefix: str = "") -> list[str]:
    found = []
    for key, value in settings.items():
        found += _auto_keys(value, f"{prefix}{key}.") if isinstance(value, dict) else (
            [prefix + key] if value == AUTO else [])
    return found


def _check_combinations(settings: dict, source: str, tensor_parallel_size: int) -> list[str]:
    zero = settings["zero_optimization"]
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise InputError(f"{source}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    if zero.get("zero_hpz_partition_size", 1) > 1 and tensor_parallel_size > 1:
        raise InputError(f"{source}: zero_hpz_partition_size with tensor parallelism trains wrong weights silently; "
                         "remove it or use one tensor rank")
    warnings = []
    if settings.get("activation_checkpointing", {}).get("partition_activations") and tensor_parallel_size == 1:
        warnings.append(f"{source}: partition_activations does nothing with one tensor rank")
    if stage < 3 and "offload_param" in zero:
        warnings.append(f"{source}: offload_param does nothing below ZeRO stage 3")
    return warnings


def zero3_worth_it(parameters: int) -> str | None:
    """Advice against ZeRO-3 for a model of this many parameters that fits a GPU anyway; None when it is sensible."""
    if parameters >= 500_000_000:
        return None
    return (f"ZeRO-3 partitions the weights of a model of {parameters / 1e6:.0f}M parameters, which costs time and saves "
            "little; ZeRO-1 or 2 is faster")
