"""DeepSpeed's keys: which of them have no place here, and why. The tables of docs/parallelism.md say the same."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from gigatok_ds.config.recipe import Recipe
from gigatok_ds.errors import InputError

# Keys of DeepSpeed 0.19.8 that something else decides here.
DECIDED_ELSEWHERE = {
    "optimizer": "the recipe's optimizer section decides",
    "scheduler": "the recipe's schedule section decides",
    "torch_autocast": "the recipe's training.precision decides",
    "bfloat16": "it is an old name of 'bf16'",
    "data_efficiency": "the recipe's data section decides",
    "dataloader_drop_last": "DeepSpeed does not load the data here",
    "managed_gradient_accumulation": "the training loop lets DeepSpeed count micro batches",
    "gradient_allreduce_op": "gradients are averaged over data ranks",
    "vocabulary_size": "DeepSpeed only compares it with 8",
    "seq_parallel_communication_data_type": "it is for a sequence parallelism of DeepSpeed that is not used here",
    **dict.fromkeys(
        ("tensor_parallel", "expert_parallel", "pipeline", "sequence_parallel_size", "data_parallel_size",
         "use_data_before_expert_parallelism", "hybrid_engine", "weight_quantization", "autotuning"),
        "this feature of DeepSpeed is not used here",
    ),
}

SECTIONS = frozenset({
    "zero_optimization", "bf16", "fp16", "data_types", "activation_checkpointing", "compile", "checkpoint",
    "datastates_ckpt",
    "aio", "timers", "flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet",
})
_FLAGS = ("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "prescale_gradients", "disable_allgather",
          "wall_clock_breakdown", "memory_breakdown", "dump_state", "disable_python_gc")

# Every top-level key that DeepSpeed 0.19.8 reads, without those it has removed (amp, elasticity, ...).
KNOWN_KEYS = frozenset({
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "communication_data_type", "gradient_predivide_factor", "steps_per_print", "log_level",
    *_FLAGS, *SECTIONS, *DECIDED_ELSEWHERE,
})

# What DeepSpeed prints at log level info, and only then.
REPORTING = ("steps_per_print", "memory_breakdown", "dump_state")
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")

_MONITOR = "metrics.jsonl, TensorBoard events and monitor.wandb_project show a run here, with all of its losses"
_NO_CHECKPOINT = "DeepSpeed writes and reads no checkpoint here; the recipe's checkpoint section decides"
_NVME = "NVMe is not used, since no checkpoint could be written from there"
_INT8 = "it would send in 8 bits what the recipe's training.precision says"
_FLOAT32 = "weights and moments that are trained, and checkpoints, are float32 here: in 16 bits small updates are lost"
OFF = (False, None)

# What is refused unless it has one of these values, with which it changes nothing. `*` stands for any key.
_REFUSED: dict[str, tuple[tuple[object, ...], str]] = {
    "wall_clock_breakdown": (OFF, "its timers allow one backward pass for each forward pass; throughput/ is logged"),
    "flops_profiler.enabled": (
        OFF,
        "it sets wall_clock_breakdown, whose timers allow one backward pass for each forward pass; mfu is logged",
    ),
    "disable_allgather": (OFF, "DeepSpeed reads it and does nothing with it"),
    "activation_checkpointing.*": (
        (*OFF, 0),
        "it does nothing: the recipe's parallel.recompute_every and parallel.sequence "
        "decide what is kept of activations",
    ),
    "compile.*": (
        (*OFF, []),
        "it does nothing, since DeepSpeed is not asked to compile; the recipe's training.compile decides",
    ),
    "checkpoint.*": ((), _NO_CHECKPOINT),
    "datastates_ckpt.*": ((), _NO_CHECKPOINT),
    "aio.*": ((), _NVME),
    "comms_logger.enabled": (
        OFF,
        "nothing here asks DeepSpeed for its summary; gigatok-ds check-cluster measures the network",
    ),
    **{f"{name}.enabled": (OFF, _MONITOR) for name in ("tensorboard", "wandb", "csv_monitor", "comet")},
    "bf16.immediate_grad_update": (OFF, "gradients are looked at before they are applied (faults.in_a_row)"),
    "bf16.bf16_master_weights_and_grads": (OFF, _FLOAT32),
    "bf16.bf16_optimizer_states": (OFF, _FLOAT32),
    "fp16.fp16_master_weights_and_grads": (OFF, _FLOAT32),
    "fp16.auto_cast": (OFF, "networks cast what they are given themselves"),
    "data_types.buffer_dtype": ((None,), "buffers keep their own types here, which checkpoints promise"),
    "data_types.keep_in_fp32_modules": (([],), "buffers keep their own types here anyway"),
    "zero_optimization.zenflow": ((None,), "it is another optimizer than the recipe's"),
    "zero_optimization.compute_grad_norm": ((True,), "the norm is clipped by, and logged"),
    "zero_optimization.cpu_offload": (OFF, 'it is an old name; write "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": (OFF, 'it is an old name; write "offload_param": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_use_pin_memory": (OFF, "it is an old name of pin_memory in offload_optimizer"),
    "zero_optimization.load_from_fp32_weights": ((True,), _NO_CHECKPOINT),
    "zero_optimization.leaf_module.*": ((), "the recipe's training.compile decides which parts are gathered whole"),
    **{
        f"zero_optimization.{name}": (OFF, _NO_CHECKPOINT)
        for name in (
            "elastic_checkpoint",
            "pipeline_loading_checkpoint",
            "gather_16bit_weights_on_model_save",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_gather_fp16_weights_on_model_save",
        )
    },
    "zero_optimization.save_muon_momentum_buffer_in_memory": (OFF, "the recipe's optimizer section decides"),
    **{
        f"zero_optimization.{name}": ((0,), "modules here are also called in parts, where ZeRO-3 would not gather them")
        for name in ("module_granularity_threshold", "stage3_module_granularity_threshold")
    },
    "zero_optimization.legacy_stage1": (OFF, "it is an old implementation"),
    "zero_optimization.parameter_alignment": (OFF, "checkpoints here know partitions without gaps"),
    "zero_optimization.round_robin_gradients": (OFF, "checkpoints here know partitions in the order of parameters"),
    **{
        f"zero_optimization.{name}": (OFF, _INT8)
        for name in ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")
    },
    **{
        f"zero_optimization.{section}.device": (("cpu", "none"), _NVME)
        for section in ("offload_optimizer", "offload_param")
    },
    **{
        f"zero_optimization.{section}.{name}": ((), _NVME)
        for section in ("offload_optimizer", "offload_param")
        for name in ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu")
    },
    **{
        f"zero_optimization.offload_optimizer.{name}": (OFF, _NVME)
        for name in ("pipeline_read", "pipeline_write", "fast_init")
    },
    "zero_optimization.offload_optimizer.ratio": (
        (1, 1.0),
        "AdamW is torch's here, which updates all or nothing on the host",
    ),
    "zero_optimization.offload_optimizer.super_offload": (OFF, "AdamW is torch's here"),
    "zero_optimization.offload_optimizer.cpuadam_cores_perc": ((), "AdamW is torch's here"),
}

_DTYPES = {"fp32": ("fp32", "float32", "float", "torch.float32"), "bf16": ("bf16", "bfloat16", "torch.bfloat16"),
           "fp16": ("fp16", "float16", "half", "torch.float16")}
_DATA_TYPES = ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")

# Least and greatest whole numbers; ZeRO's sizes are in elements, and DeepSpeed divides by some of them.
_WHOLE = {
    "steps_per_print": (1, None), "fp16.initial_scale_power": (0, 32), "fp16.hysteresis": (1, None),
    "fp16.loss_scale_window": (1, None), "fp16.min_loss_scale": (1, 2**32),
    "zero_optimization.reduce_bucket_size": (1, None), "zero_optimization.allgather_bucket_size": (2, None),
    "zero_optimization.sub_group_size": (1, None),
}


def nearest(name: str, known: Iterable[str], *, allowed: Iterable[str]) -> str:
    """The known name that is most like `name`, as a question; without one, what is allowed."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"allowed are {', '.join(sorted(allowed))}"


def refuse_unsupported(settings: dict[str, Any], source: str, recipe: Recipe) -> None:
    """Raise InputError for what would do nothing here, would break, or contradicts the recipe's precision."""
    for path, value in _leaves(settings):
        if value == "auto":  # of zero_optimization, where it stands for DeepSpeed's default
            continue
        allowed, reason = next(_rules(path), ((value,), ""))
        if not any(type(value) is type(one) and value == one for one in allowed):
            values = " or ".join(map(repr, allowed))
            raise InputError(f"{source}: {path} is {value!r}; remove it{f' (or write {values})' if values else ''}: "
                             f"{reason}")
    for path, (least, greatest) in _WHOLE.items():
        section, _, name = path.rpartition(".")
        holder = settings.get(section, {}) if section else settings
        if name in holder and holder[name] != "auto":
            _check_number(path, holder[name], least, greatest, source)
    _check_scalars(settings, source)
    _check_types(settings, source, recipe)


def _rules(path: str) -> Iterator[tuple[tuple[object, ...], str]]:
    """The rules that refuse a key, or a section around it."""
    while path:
        above, _, _ = path.rpartition(".")
        yield from (_REFUSED[name] for name in (path, f"{above}.*") if name in _REFUSED)
        path = above


def _leaves(settings: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted names; an empty section is a value."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _check_number(path: str, value: Any, least: int, greatest: int | None, source: str) -> None:
    if value is None and path == "steps_per_print":
        return
    full = isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1
    if not full or value < least or (greatest is not None and value > greatest):
        bound = f"from {least} to {greatest}" if greatest is not None else f"of at least {least}"
        raise InputError(f"{source}: {path} is {value!r}; a whole number {bound} is expected")
    if path == "zero_optimization.allgather_bucket_size" and value % 2:  # DeepSpeed aligns to two elements
        raise InputError(f"{source}: {path} is {value!r}; an even number is expected")


def _check_scalars(settings: dict[str, Any], source: str) -> None:
    for key in _FLAGS:
        if not isinstance(settings.get(key, False), bool):
            raise InputError(f"{source}: {key} is {settings[key]!r}; it must be true or false")
    factor = settings.get("gradient_predivide_factor", 1)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < float("inf"):
        raise InputError(f"{source}: gradient_predivide_factor is {factor!r}; a number above 0 is expected")
    stage = settings["zero_optimization"]["stage"]
    if stage >= 2 and (settings.get("prescale_gradients") or factor != 1):
        raise InputError(f"{source}: prescale_gradients and gradient_predivide_factor are for ZeRO stages 0 and 1 in "
                         f"DeepSpeed, and the stage is {stage}; remove them")
    level = settings.get("log_level")
    if level is not None and level not in LOG_LEVELS:
        raise InputError(f"{source}: log_level is {level!r}; allowed are {', '.join(LOG_LEVELS)}")
    for key in settings.get("timers", {}):
        if key != "throughput":
            raise InputError(f"{source}: unknown key {key!r} in timers; allowed is throughput")
    fp16 = settings["fp16"]
    if fp16.get("min_loss_scale", 1) > 2 ** fp16.get("initial_scale_power", 16):
        raise InputError(f"{source}: fp16.min_loss_scale is {fp16['min_loss_scale']}, which is above the scale to "
                         f"begin with, 2 to the power of fp16.initial_scale_power")


def _check_types(settings: dict[str, Any], source: str, recipe: Recipe) -> None:
    """Types of numbers: those that the recipe's precision stands for, or float32 for sums over ranks."""
    precision, types = recipe.training.precision, settings.get("data_types", {})
    for key in types:
        if key not in _DATA_TYPES:
            raise InputError(f"{source}: unknown key {key!r} in data_types; "
                             f"{nearest(key, _DATA_TYPES, allowed=_DATA_TYPES)}")
    for key in ("grad_accum_dtype", "param_dtype"):
        if types.get(key) is not None and types[key] not in _DTYPES[precision]:
            raise InputError(f"{source}: data_types.{key} is {types[key]!r}, but recipe {recipe.name} trains in "
                             f"{precision} (training.precision); remove it, or write {precision!r}")
    sent = settings.get("communication_data_type")
    allowed = dict.fromkeys((precision, "fp32"))
    if sent is not None and (not isinstance(sent, str) or sent.lower() not in allowed):
        raise InputError(f"{source}: communication_data_type is {sent!r}, but recipe {recipe.name} trains in "
                         f"{precision} (training.precision), and gradients would be rounded on their way; allowed: "
                         f"{', '.join(allowed)}")
