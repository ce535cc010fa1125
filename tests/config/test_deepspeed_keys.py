"""Every key of DeepSpeed's settings works here or is refused with the reason, in one line, before any rank starts."""

import copy
import functools
import json
import os
import random
import re

import pytest
import torch
from places import ROOT
from rank_runs import run_ranks
from saved_runs import read_everything
from training_runs import partitioning, prepare, start

from gigatok_ds import InputError
from gigatok_ds.checkpoint.run_directory import checkpoint_path, read_state
from gigatok_ds.config.deepspeed import check_settings, resolve_deepspeed, scaler_search, zero_settings
from gigatok_ds.config.deepspeed_keys import DECIDED_ELSEWHERE, KNOWN_KEYS
from gigatok_ds.config.load import load_recipe
from gigatok_ds.training.run import failure_reason, run_training

PAGE = (ROOT / "docs" / "parallelism.md").read_text()


def settings(stage=1, **change):
    """Those of a ZeRO stage; `zero` changes its section."""
    zero = change.pop("zero", {})
    found = zero_settings(stage) | change
    found["zero_optimization"] |= zero
    return found


@functools.cache
def recipe_of(precision):
    return load_recipe("GPT-B", [f"training.precision={precision}"])


def resolve(given, precision="fp32"):
    return resolve_deepspeed(given, recipe_of(precision), data_parallel_size=1)[0]


def refused(given, precision="fp32"):
    with pytest.raises(InputError) as caught:
        resolve(given, precision)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("given, said", [
    (settings(wall_clock_breakdown=True),
     "wall_clock_breakdown is True; remove it (or write False or None): its timers"),
    (settings(flops_profiler={"enabled": True}), "flops_profiler.enabled is True"),
    (settings(compile={"deepcompile": True}), "compile.deepcompile is True; .*the recipe's training.compile decides"),
    (settings(compile={"passes": ["z3"]}), "compile.passes"),
    (settings(activation_checkpointing={"partition_activations": True}), "partition_activations is "
                                                                         "True.*recompute_every"),
    (settings(checkpoint={"tag_validation": "Fail"}),
     "checkpoint.tag_validation.*the recipe's checkpoint section decides"),
    (settings(datastates_ckpt={"config": {"host_cache_size": 1}}), "datastates_ckpt.config.host_cache_size"),
    (settings(aio={"block_size": 1}), "aio.block_size"),
    (settings(comms_logger={"enabled": True}), "comms_logger.enabled.*check-cluster"),
    (settings(tensorboard={"enabled": True}), "tensorboard.enabled.*metrics.jsonl"),
    (settings(wandb={"enabled": True}), "wandb.enabled"),
    (settings(csv_monitor={"enabled": True}), "csv_monitor.enabled"),
    (settings(comet={"enabled": True}), "comet.enabled"),
    (settings(disable_allgather=True), "disable_allgather"),
    (settings(vocabulary_size=8), "'vocabulary_size'; remove it"),
    (settings(seq_parallel_communication_data_type="fp32"), "'seq_parallel_communication_data_type'; remove it"),
    (settings(2, prescale_gradients=True), "for ZeRO stages 0 and 1"),
    (settings(3, gradient_predivide_factor=2.0), "for ZeRO stages 0 and 1"),
    (settings(gradient_predivide_factor=0), "a number above 0"),
    (settings(prescale_gradients="yes"), "must be true or false"),
    (settings(steps_per_print=0), "steps_per_print is 0; a whole number of at least 1"),
    (settings(log_level="loud"), "log_level is 'loud'; allowed are debug"),
    (settings(timers={"step": {}}), "unknown key 'step' in timers"),
    (settings(timers=3), "timers is 3; it must be a JSON object"),
    (settings(zero={"zenflow": {"topk_ratio": 0.1}}), "zero_optimization.zenflow.topk_ratio"),
    (settings(zero={"compute_grad_norm": False}), "compute_grad_norm"),
    (settings(zero={"zero_quantized_gradients": True}), "zero_quantized_gradients.*8 bits"),
    (settings(zero={"cpu_offload": True}), "cpu_offload is True.*offload_optimizer"),
    (settings(zero={"offload_optimizer": {"device": "nvme"}}), "offload_optimizer.device is 'nvme'.*NVMe"),
    (settings(3, zero={"offload_param": {"device": "cpu", "nvme_path": "/x"}}), "offload_param.nvme_path"),
    (settings(3, zero={"offload_optimizer": {"device": "cpu", "ratio": 0.5}}), "offload_optimizer.ratio is 0.5"),
    (settings(zero={"allgather_bucket_size": 0}), "allgather_bucket_size is 0; a whole number of at least 2"),
    (settings(zero={"allgather_bucket_size": 10**6 + 1}), "allgather_bucket_size is 1000001; an even number is "
                                                          "expected"),
    (settings(3, zero={"stage3_module_granularity_threshold": 9}), "stage3_module_granularity_threshold is 9"),
    (settings(zero={"parameter_alignment": True}), "parameter_alignment"),
    (settings(2, zero={"round_robin_gradients": True}), "round_robin_gradients"),
    (settings(3, zero={"leaf_module": {"names": ["x"]}}), "leaf_module.names"),
], ids=lambda value: value if isinstance(value, str) else "")
def test_what_would_break_or_do_nothing_is_refused_with_the_reason(given, said):
    message = refused(given)
    assert re.search(said.replace("(or", r"\(or").replace("None)", r"None\)"), message), message


@pytest.mark.parametrize("precision, given, said", [
    ("bf16", {"bf16": {"bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads.*float32"),
    ("bf16", {"bf16": {"bf16_optimizer_states": True}}, "bf16_optimizer_states.*float32"),
    ("bf16", {"bf16": {"immediate_grad_update": True}}, "immediate_grad_update"),
    ("fp16", {"fp16": {"fp16_master_weights_and_grads": True}}, "fp16_master_weights_and_grads.*float32"),
    ("fp16", {"fp16": {"auto_cast": True}}, "auto_cast"),
    ("fp16", {"fp16": {"initial_scale_power": 33}}, "a whole number from 0 to 32"),
    ("fp16", {"fp16": {"hysteresis": 0}}, "a whole number of at least 1"),
    ("fp16", {"fp16": {"loss_scale_window": 0.5}}, "a whole number of at least 1"),
    ("fp16", {"fp16": {"min_loss_scale": 32, "initial_scale_power": 4}}, "above the scale to begin with"),
    ("fp32", {"data_types": {"grad_accum_dtype": "bf16"}},
     "grad_accum_dtype is 'bf16', but recipe GPT-B trains in fp32"),
    ("fp32", {"data_types": {"grad_accum_dtype": "fp16"}}, "grad_accum_dtype is 'fp16'"),
    ("bf16", {"data_types": {"grad_accum_dtype": "fp32"}},
     "grad_accum_dtype is 'fp32', but recipe GPT-B trains in bf16"),
    ("bf16", {"data_types": {"param_dtype": "fp16"}}, "param_dtype is 'fp16'"),
    ("bf16", {"data_types": {"buffer_dtype": "bf16"}}, "buffer_dtype"),
    ("bf16", {"data_types": {"keep_in_fp32_modules": ["x"]}}, "keep_in_fp32_modules"),
    ("bf16", {"data_types": {"grad_accumulation_dtype": "bf16"}}, "unknown key .* did you mean grad_accum_dtype"),
    ("fp32", {"communication_data_type": "bf16"}, "communication_data_type is 'bf16', but .* allowed: fp32$"),
    ("fp32", {"communication_data_type": "fp16"}, "allowed: fp32$"),
    ("bf16", {"communication_data_type": "fp16"}, "allowed: bf16, fp32$"),
    ("fp16", {"communication_data_type": 16}, "allowed: fp16, fp32$"),
])
def test_no_number_has_another_type_than_the_recipe_says(precision, given, said):
    assert re.search(said, refused(settings() | given, precision))


@pytest.mark.parametrize("precision, given", [
    ("fp32", {"communication_data_type": "FP32", "data_types": {"grad_accum_dtype": "float32"}}),
    ("bf16", {"communication_data_type": "fp32", "bf16": {"check_grad_overflow": False}}),
    ("fp16", {"communication_data_type": "fp16", "fp16": {"loss_scale": 128, "hysteresis": 1}}),
])
def test_what_agrees_passes(precision, given):
    resolve(settings() | given, precision)


def test_what_says_that_nothing_is_on_passes():
    """Files that other programs wrote list what they do not use."""
    idle = {"wall_clock_breakdown": False, "flops_profiler": {"enabled": False, "profile_step": 1},
            "memory_breakdown": False,
            "tensorboard": {"enabled": False, "output_path": "x"}, "compile": {"deepcompile": False},
            "activation_checkpointing": {"partition_activations": False, "number_checkpoints": None}, "aio": {}}
    auto = {"reduce_bucket_size": "auto", "stage3_gather_16bit_weights_on_model_save": "auto"}
    assert resolve(settings(3, zero=auto, **idle))["zero_optimization"]["reduce_bucket_size"] == "auto"


def test_how_long_a_scale_is_searched_for():
    def search(**fp16):
        return scaler_search(resolve(settings(fp16={"enabled": True, **fp16}), "fp16"))

    assert search() == 17 and search(hysteresis=1) == 16 and search(initial_scale_power=4, min_loss_scale=2) == 4
    assert search(loss_scale=128) == 0 and scaler_search(resolve(settings(), "bf16")) == 0


# Against DeepSpeed's own models


@pytest.fixture(scope="module")
def deepspeed():
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed")


def asked(given, precision="fp32"):
    """None, or the one line that DeepSpeed's models lead to."""
    from gigatok_ds.engine.deepspeed_schema import check_with_deepspeed

    try:
        check_with_deepspeed(*check_settings(given, recipe_of(precision)))
    except InputError as error:
        assert "\n" not in str(error) and "pydantic" not in str(error)
        return str(error)
    return None


@pytest.mark.parametrize("zero, said", [
    ({"overlap_com": True}, "unknown key 'overlap_com' in zero_optimization; did you mean overlap_comm?"),
    ({"strict": True}, "unknown key 'strict' in zero_optimization"),
    ({"reduce_bucket_size": -5}, "reduce_bucket_size is -5"),
    ({"overlap_comm": "perhaps"}, "zero_optimization.overlap_comm is 'perhaps': input should be a valid boolean"),
    ({"stage3_max_live_parameters": -1},
     "stage3_max_live_parameters is -1: input should be greater than or equal to 0"),
    ({"offload_optimizer": {"devise": "cpu"}}, "unknown key 'devise' in zero_optimization.offload_optimizer; did you "
                                               "mean device?"),
    ({"offload_optimizer": {"device": "cpu", "pin_memory": 7}}, "zero_optimization.offload_optimizer.pin_memory is 7"),
    ({"offload_param": True}, "zero_optimization.offload_param is True; it must be a JSON object"),
])
def test_inner_keys_and_values_are_checked_by_deepspeed(deepspeed, zero, said):
    assert said in asked(settings(3, zero=zero))


@pytest.mark.parametrize("precision, given, said", [
    ("bf16", {"bf16": {"enable": True}}, "unknown key 'enable' in bf16; did you mean enabled?"),
    ("fp16", {"fp16": {"loss_scale": "high"}}, "fp16.loss_scale is 'high': fp16.loss_scale must be a number"),
    ("fp16", {"fp16": {"loss_scal": 1}}, "unknown key 'loss_scal' in fp16; did you mean loss_scale?"),
    ("fp32", {"timers": {"throughput": {"synchronised": True}}}, "did you mean synchronized?"),
    ("fp32", {"comms_logger": {"enabledd": False}}, "did you mean enabled?"),
])
def test_the_other_sections_are_checked_too(deepspeed, precision, given, said):
    assert said in asked(settings() | given, precision)


VALUES = (None, True, False, 0, 1, -1, 0.5, 1e12, 10**30, float("nan"), "auto", "fp16", "", "1", [], ["x"], {},
          {"enabled": True})


PER_RANK = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}


@pytest.mark.parametrize("count", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_what_passes_is_understood_by_deepspeed_and_all_else_is_one_line(deepspeed, count):
    """Random values below random keys, from a fixed seed."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    places = [(key,) for key in sorted(KNOWN_KEYS - DECIDED_ELSEWHERE.keys() - PER_RANK)]
    for path, model in (("zero_optimization", DeepSpeedZeroConfig), ("bf16", DeepSpeedBF16Config),
                        ("fp16", DeepSpeedFP16Config),
                        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
                        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig)):
        places += [(*path.split("."), field.alias or name) for name, field in model.model_fields.items()]
    places += [("data_types", name) for name
               in ("grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules")]
    rng, passed = random.Random(30), 0
    for _ in range(count):
        place, precision = rng.choice(places), rng.choice(("fp32", "bf16", "fp16"))
        given = settings(rng.randrange(4))
        holder = given
        for name in place[:-1]:
            holder = holder.setdefault(name, {})
        holder[place[-1]] = copy.deepcopy(rng.choice(VALUES))
        if asked(given, precision) is None:
            passed += 1
            DeepSpeedConfig(resolve(given, precision))  # a message of its own would be a traceback on each rank
    assert count / 10 < passed < count * 9 / 10


def test_every_key_is_on_the_page(deepspeed):
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = [field.alias or name for model in (DeepSpeedZeroConfig, DeepSpeedBF16Config, DeepSpeedFP16Config)
              for name, field in model.model_fields.items()]
    named = set(re.findall(r"`([a-z_0-9]+)`", PAGE))
    assert not {*fields, *KNOWN_KEYS} - named


# Runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    return folder, prepare(folder)


@pytest.mark.parametrize("given, said", [
    ({"zero_optimization": {"stage": 2, "overlap_com": True}}, "did you mean overlap_comm?"),
    ({"fp16": {"enabled": True}}, "fp16.enabled"),
])
def test_nothing_is_written_before_all_is_checked(data, tmp_path, given, said):
    folder, names = data
    (tmp_path / "mine.json").write_text(json.dumps(given))
    code, output = start([folder / "gpt.yaml", "--out", tmp_path / "run", *names["gpt"], "--deepspeed",
                          tmp_path / "mine.json"])
    assert code == 2 and said in output and "Traceback" not in output and "pydantic" not in output, output
    assert not (tmp_path / "run").exists()


def test_what_failed_is_told_without_what_a_library_adds_to_it():
    text = ('rank 0 (host a, pid 1) failed:\nTraceback (most recent call last):\n  File "x.py", line 1, in f\n    f()\n'
            "pydantic_core.ValidationError: 1 validation error for A\nb\n  Extra inputs are not permitted [type=x]\n"
            "    For further information visit https://errors.pydantic.dev/2.11/v/extra_forbidden")
    assert failure_reason(text) == ("pydantic_core.ValidationError: 1 validation error for A b Extra inputs are not "
                                 "permitted [type=x]")
    assert failure_reason("gigatok-ds train: error: no\n") == "gigatok-ds train: error: no"


def train(recipe, out, given):
    run_training(recipe, out, given)


def trained(data, out, given, precision, ranks):
    folder, names = data
    recipe = load_recipe(folder / "gpt.yaml",
                         [*names["gpt"], "training.steps=3", "checkpoint.every=3", "training.validate_every=3",
                                               f"training.precision={precision}"])
    run_ranks(train, ranks, recipe, out, given)
    folder = checkpoint_path(out, 3)
    return {(part, *key): value for part in read_state(folder).parts
            for key, value in read_everything(folder / part)[0].items()}


BUCKETS = {"reduce_bucket_size": 1, "allgather_bucket_size": 2}
WORKS = [
    (0, "fp32", {"prescale_gradients": True, "gradient_predivide_factor": 4.0}, {}),
    (1, "fp32", {"prescale_gradients": True, "gradient_predivide_factor": 4.0}, BUCKETS),
    (1, "fp32", {"zero_allow_untested_optimizer": False, "disable_python_gc": True, "log_level": "error"},
     {"contiguous_gradients": False, "reduce_scatter": False, "allgather_partitions": False, "overlap_comm": False}),
    (2, "fp32", {"memory_breakdown": True, "dump_state": True, "steps_per_print": 1,
                 "timers": {"throughput": {"enabled": True, "synchronized": False}}}, BUCKETS),
    (2, "fp32", {}, {"contiguous_gradients": False, "use_multi_rank_bucket_allreduce": False,
                     "ignore_unused_parameters": False, "reduce_scatter": False}),
    (3, "fp32", {}, {"reduce_bucket_size": 1, "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0,
                     "stage3_model_persistence_threshold": 0,
                     "memory_efficient_linear": False, "log_trace_cache_warnings": True}),
    (3, "fp32", {}, {"stage3_use_all_reduce_for_fetch_params": True, "reduce_scatter": False,
                     "enable_sanity_checks": True}),
    (3, "fp32", {}, {"stage3_allgather_sequential": True, "sub_group_size": 100, "zero_hpz_partition_size": 2}),
    (3, "fp32", {}, {"offload_optimizer": {"device": "cpu", "pin_memory": False},
                     "offload_param": {"device": "cpu", "pin_memory": False}}),
    (2, "fp32", {}, {"offload_optimizer": {"device": "cpu", "pin_memory": False}}),
    (2, "bf16", {"communication_data_type": "fp32", "bf16": {"check_grad_overflow": False}}, {}),
    (3, "bf16", {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "bf16"}}, {}),
]


@pytest.mark.slow
@pytest.mark.parametrize("stage, precision, change, zero", WORKS, ids=lambda value: str(value))
def test_what_is_allowed_trains_as_without_it(data, tmp_path, stage, precision, change, zero):
    """On two ranks, bit for bit but for the order of sums; a sum of two numbers has one order."""
    given = partitioning(stage)
    plain = trained(data, tmp_path / "plain", given, precision, 2)
    changed = copy.deepcopy(given) | change
    changed["zero_optimization"] |= zero
    found = trained(data, tmp_path / "changed", changed, precision, 2)
    assert plain.keys() == found.keys()
    for key, value in plain.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
