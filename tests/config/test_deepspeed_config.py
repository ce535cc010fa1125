"""DeepSpeed settings: every `auto` is resolved, every conflict refused, and nothing is left to DeepSpeed's defaults."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from places import ROOT

from gigatok_ds import InputError
from gigatok_ds.config.deepspeed import (
    BUNDLED,
    read_settings,
    resolve_deepspeed,
    zero3_worth_it,
    zero_settings,
)
from gigatok_ds.config.deepspeed_keys import DECIDED_ELSEWHERE, KNOWN_KEYS
from gigatok_ds.config.load import load_recipe

FOLDER = ROOT / "ds_configs"
RECIPE = load_recipe("VQ_SS256")  # global batch 128, fp16, clipping at 10


@pytest.mark.parametrize("name, settings", [
    *((f"zero{stage}.json", zero_settings(stage)) for stage in range(4)),
    ("zero3_offload.json", zero_settings(3, offload=True)),
])
def test_the_files_are_what_the_command_line_stands_for(name, settings):
    assert json.loads((FOLDER / name).read_text()) == settings
    assert len(list(FOLDER.glob("*.json"))) == 5


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_everything_is_resolved(path):
    resolved, warnings = resolve_deepspeed(path, RECIPE, data_parallel_size=8)
    assert "auto" not in json.dumps(resolved) and not warnings
    assert resolved["train_batch_size"] == 128
    assert resolved["train_micro_batch_size_per_gpu"] == 16 and resolved["gradient_accumulation_steps"] == 1
    assert resolved["gradient_clipping"] == 10.0
    assert resolved["fp16"]["enabled"] is True and resolved["bf16"]["enabled"] is False


def test_micro_batches_accumulate():
    recipe = load_recipe("VQ_SS256", ["training.micro_batch_size=4"])
    resolved, _ = resolve_deepspeed(zero_settings(2), recipe, data_parallel_size=8)
    assert resolved["gradient_accumulation_steps"] == 4


@pytest.mark.parametrize("change, words", [
    ({"train_batch_size": 64}, "sets train_batch_size to 64, but recipe VQ_SS256 asks for 128"),
    ({"gradient_clipping": 1.0}, "sets gradient_clipping to 1.0, but recipe VQ_SS256 asks for 10.0"),
    ({"bf16": {"enabled": True}}, "sets bf16.enabled to True"),
    ({"optimizer": {"type": "AdamW"}}, "'optimizer'; remove it"),
    ({"scheduler": {"type": "WarmupLR"}}, "'scheduler'; remove it: the recipe's schedule"),
    ({"zero_optimisation": {}}, "did you mean zero_optimization?"),
    ({"zero_optimization": {"stage": 4}}, "must be 0, 1, 2 or 3"),
    ({"communication_data_type": "auto"}, "communication_data_type cannot be 'auto'"),
])
def test_conflicts_are_refused(change, words):
    with pytest.raises(InputError) as error:
        resolve_deepspeed(zero_settings(1) | change, RECIPE, data_parallel_size=8)
    assert words in str(error.value)


@pytest.mark.parametrize("name, micro, multiple", [("VQ_SS256", 7, 2), ("VQ_BL256_dino_disc", 8, 16)])
def test_tensor_ranks_that_cannot_share_a_micro_batch(name, micro, multiple):
    recipe = load_recipe(name, ["parallel.tensor=2", f"training.micro_batch_size={micro}"])
    with pytest.raises(InputError, match=f"choose training.micro_batch_size as a multiple of {multiple}$"):
        resolve_deepspeed(zero_settings(1), recipe, data_parallel_size=1)


def test_batches_that_do_not_divide_are_explained():
    with pytest.raises(InputError, match="global_batch_size 128 is not a multiple of 3 data ranks x micro batch 42"):
        resolve_deepspeed(zero_settings(1), RECIPE, data_parallel_size=3)


def test_what_is_silently_wrong_or_useless_is_said():
    hpz = zero_settings(3)
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 8
    resolve_deepspeed(hpz, RECIPE, data_parallel_size=8)
    with pytest.raises(InputError, match="zero_hpz_partition_size with tensor parallelism"):
        resolve_deepspeed(hpz, load_recipe("VQ_SS256", ["parallel.tensor=2"]), data_parallel_size=8)
    sharded = load_recipe("VQ_SS256", ["parallel.tensor=2"])
    with pytest.raises(InputError, match=r"stage 0 in fp16 with tensor parallelism .* use stage 1"):
        resolve_deepspeed(zero_settings(0), sharded, data_parallel_size=8)
    resolve_deepspeed(zero_settings(1), sharded, data_parallel_size=8)
    assert "136M" in zero3_worth_it(136_000_000) and zero3_worth_it(2_900_000_000) is None


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match="there is no DeepSpeed settings file"):
        resolve_deepspeed(tmp_path / "none.json", RECIPE, data_parallel_size=1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        resolve_deepspeed(tmp_path / "broken.json", RECIPE, data_parallel_size=1)


def recipe(*overrides):
    return load_recipe("GPT-B", overrides)


def resolve(settings, *overrides, ranks=4):
    return resolve_deepspeed(settings, recipe(*overrides), data_parallel_size=ranks)


def refused(settings, *overrides, ranks=4):
    """The message for settings that must be refused; always a single line."""
    with pytest.raises(InputError) as caught:
        resolve(settings, *overrides, ranks=ranks)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def settings_file(tmp_path):
    def write(text):
        path = tmp_path / "mine.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture(scope="module")
def deepspeed_config_class():
    """DeepSpeed's own parser of its settings, in whichever version is installed."""
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return pytest.importorskip("deepspeed.runtime.config").DeepSpeedConfig


# The bundled settings


@pytest.mark.parametrize("name", BUNDLED)
def test_the_json_files_are_what_zero_stands_for(name):
    stage, offload = BUNDLED[name]
    settings = zero_settings(stage, offload=offload)
    assert json.loads((FOLDER / f"{name}.json").read_text()) == settings == read_settings(name)
    assert read_settings(FOLDER / f"{name}.json") == settings
    assert settings["zero_optimization"]["stage"] == stage
    assert ("offload_param" in settings["zero_optimization"]) == offload


@pytest.mark.parametrize(("stage", "offload"), [(4, False), (-1, False), (1, True)])
def test_zero_settings_refuses_what_there_is_not(stage, offload):
    with pytest.raises(InputError, match="allowed are stages 0 to 3"):
        zero_settings(stage, offload=offload)


# auto


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_auto_is_resolved_from_the_recipe(name, precision):
    settings, _ = resolve(name, f"training.precision={precision}", "training.micro_batch_size=16",
                          "optimizer.max_grad_norm=0.5")
    assert settings["train_batch_size"] == 256
    assert settings["train_micro_batch_size_per_gpu"] == 16
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": precision == "bf16"}
    assert settings["fp16"] == {"enabled": precision == "fp16"}
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["steps_per_print"] > 10**6
    assert '"auto"' not in json.dumps(settings)


def test_nothing_given_is_everything_resolved():
    settings, warnings = resolve({}, "training.precision=fp32", "optimizer.max_grad_norm=0")
    # Left out, DeepSpeed would clip at 1.0.
    assert settings["gradient_clipping"] == 0.0
    assert settings["train_micro_batch_size_per_gpu"] == 64 and settings["gradient_accumulation_steps"] == 1
    assert settings["zero_optimization"] == {"stage": 0} and warnings == []


def test_the_input_is_not_changed():
    given = zero_settings(1)
    before = copy.deepcopy(given)
    resolve(given)
    assert given == before


def test_values_that_agree_and_values_that_are_only_deepspeeds_stay():
    given = {"train_batch_size": 256, "gradient_clipping": 1, "steps_per_print": 10,
             "wall_clock_breakdown": False,
             "fp16": {"enabled": True, "loss_scale_window": 500}, "zero_allow_untested_optimizer": "auto",
             "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}
    settings, warnings = resolve(given)
    assert settings["fp16"] == {"enabled": True, "loss_scale_window": 500}
    assert settings["steps_per_print"] == 10 and settings["wall_clock_breakdown"] is False
    assert settings["log_level"] == "info", "else DeepSpeed would print nothing every 10 steps"
    assert settings["zero_allow_untested_optimizer"] is True
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": "auto"}
    assert warnings == []


def test_auto_elsewhere_is_refused():
    message = refused({"fp16": {"enabled": "auto", "loss_scale": "auto"}})
    assert message == "the DeepSpeed settings: fp16.loss_scale cannot be 'auto'; give a value or leave it out"


# Batch arithmetic


@pytest.mark.parametrize(("micro", "ranks", "expected"), [
    ("null", 1, (256, 1)), ("null", 8, (32, 1)), ("8", 8, (8, 4)), ("64", 4, (64, 1)), ("1", 256, (1, 1)),
])
def test_batches_multiply_up(micro, ranks, expected):
    settings, _ = resolve({}, f"training.micro_batch_size={micro}", ranks=ranks)
    found = settings["train_micro_batch_size_per_gpu"], settings["gradient_accumulation_steps"]
    assert found == expected and found[0] * found[1] * ranks == settings["train_batch_size"]


@pytest.mark.parametrize(("micro", "ranks", "message"), [
    ("null", 3, "global_batch_size 256 is not a multiple of 3 data ranks x micro batch 85"),
    ("24", 4, "global_batch_size 256 is not a multiple of 4 data ranks x micro batch 24"),
    ("null", 512,
     "global_batch_size 256 is not a multiple of 512 data ranks x micro batch 1"),
])
def test_batches_that_do_not_multiply_up_are_explained(micro, ranks, message):
    found = refused({}, f"training.micro_batch_size={micro}", ranks=ranks)
    assert found.startswith(f"training.{message}") and "change training.global_batch_size" in found


# Conflicts


@pytest.mark.parametrize(("given", "message"), [
    ({"train_batch_size": 128},
     "train_batch_size to 128, but recipe GPT-B asks for 256 (training.global_batch_size)"),
    ({"train_micro_batch_size_per_gpu": 8},
     "train_micro_batch_size_per_gpu to 8, but recipe GPT-B asks for 64 (training.micro_batch_size)"),
    ({"gradient_accumulation_steps": 2},
     "gradient_accumulation_steps to 2, but recipe GPT-B asks for 1 (training."),
    ({"gradient_clipping": 0.5},
     "gradient_clipping to 0.5, but recipe GPT-B asks for 1.0 (optimizer.max_grad_norm)"),
    ({"bf16": {"enabled": True}},
     "bf16.enabled to True, but recipe GPT-B asks for False (training.precision)"),
    ({"fp16": {"enabled": False}},
     "fp16.enabled to False, but recipe GPT-B asks for True (training.precision)"),
])
def test_conflicts_name_both_sources_and_values(given, message, settings_file):
    assert f"the DeepSpeed settings sets {message}" in refused(given)
    path = settings_file(json.dumps(given))
    assert f"{path} sets {message}" in refused(path)


def test_optimizer_and_scheduler_sections_are_refused_with_both_values():
    message = refused({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}})
    assert "'optimizer'; remove it" in message and "(lr here: 0.0003, in recipe GPT-B: 0.0001)" in message
    message = refused({"scheduler": {"type": "WarmupLR", "params": {}}})
    assert "'scheduler'; remove it" in message
    assert "(type here: 'WarmupLR', kind in recipe GPT-B: 'wsd')" in message
    assert "remove it" in refused({"optimizer": None})


@pytest.mark.parametrize(("key", "message"), [
    ("zero_optimisation", "unknown key 'zero_optimisation'; did you mean zero_optimization?"),
    ("train_batchsize", "unknown key 'train_batchsize'; did you mean train_batch_size?"),
    ("optimiser", "unknown key 'optimiser'; did you mean optimizer?"),
    ("qqq", "unknown key 'qqq'; allowed are activation_checkpointing, aio, bf16, "),
    ("amp", "unknown key 'amp'; "),  # removed from DeepSpeed
    ("torch_autocast", "has 'torch_autocast'; remove it: the recipe's training.precision decides"),
    ("tensor_parallel", "has 'tensor_parallel'; remove it: this feature of DeepSpeed is not used here"),
])
def test_other_top_level_keys_are_refused(key, message):
    assert message in refused({key: {}})


def test_combinations_that_train_wrongly_are_refused():
    hpz = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    assert "silently mixes weights (it is 2, with 2 tensor ranks)" in refused(
        hpz, "parallel.tensor=2")
    assert resolve(hpz)[0]["zero_optimization"]["zero_hpz_partition_size"] == 2
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert resolve(offload)[0]["zero_force_ds_cpu_optimizer"] is False
    assert "must be false" in refused(offload | {"zero_force_ds_cpu_optimizer": True})


@pytest.mark.parametrize(("given", "message"), [
    ({"bf16": True}, "bf16 is True; it must be a JSON object"),
    ({"fp16": None}, "fp16 is None; it must be a JSON object"),
    ({"zero_optimization": 3}, "zero_optimization is 3; it must be a JSON object"),
    ({"activation_checkpointing": []}, "activation_checkpointing is []; it must be a JSON object"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; it must be 0, 1, 2 or 3"),
    ({"zero_optimization": {"stage": "3"}}, "zero_optimization.stage is '3'; it must be"),
    ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage is 'auto'; it must be"),
])
def test_sections_of_the_wrong_form_are_refused(given, message):
    assert message in refused(given)


# Files


@pytest.mark.parametrize(("text", "message"), [
    ('{"bf16": ', "is not valid JSON: Expecting value: line 1 column 10"),
    ("[]", "is not a JSON object of DeepSpeed settings"),
    (b"\xff\xfe", "is not valid JSON: 'utf-8' codec"),
    ('{"train_batch_size": 1, "train_batch_size": 2}',
     "is not valid JSON: the key 'train_batch_size' appears twice"),
    ('{"fp16": {"enabled": true, "enabled": false}}', "is not valid JSON: the key 'enabled' appears twice"),
])
def test_malformed_files_are_refused(settings_file, text, message):
    path = settings_file(text)
    assert f"{path} {message}" in refused(path)


def test_missing_files_name_the_bundled_ones(tmp_path):
    assert refused("zero4").startswith("there is no DeepSpeed settings file zero4; did you mean zero")
    assert "allowed are zero0, zero1, zero2, zero3, zero3_offload" in refused(tmp_path / "none.json")


# Warnings


@pytest.mark.parametrize(("given", "message"), [
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
     "offload_param does nothing below"),
    ({}, "bf16 is less precise at ZeRO stage 0"),
])
def test_warnings_about_settings_without_effect(given, message):
    _, warnings = resolve(given, "training.precision=bf16")
    assert any(message in warning for warning in warnings)


def test_no_warnings_without_a_reason():
    given = zero_settings(3) | {"activation_checkpointing": {"partition_activations": False}}
    assert resolve(given, "training.precision=bf16", "parallel.tensor=2")[1] == []
    assert resolve(zero_settings(1), "training.precision=bf16")[1] == []


# Against DeepSpeed itself


@pytest.mark.parametrize("name", BUNDLED)
def test_deepspeed_reads_what_we_resolve(name, deepspeed_config_class):
    settings, _ = resolve(name, "training.precision=bf16", "training.micro_batch_size=32",
                          "optimizer.max_grad_norm=0", ranks=1)
    config = deepspeed_config_class(settings)
    assert (config.train_batch_size, config.train_micro_batch_size_per_gpu) == (256, 32)
    assert config.gradient_accumulation_steps == 8
    assert config.gradient_clipping == 0
    assert config.bfloat16_config.enabled and not config.float16_config.enabled
    assert int(config.zero_optimization_stage) == BUNDLED[name][0]
    assert (config.zero_config.offload_optimizer is not None) == BUNDLED[name][1]
    assert config.optimizer_name is None and config.scheduler_name is None


def test_the_known_keys_are_those_that_deepspeed_reads(deepspeed_config_class):
    asked = set()

    class Spy(dict):
        """Settings that note every key DeepSpeed asks them for."""

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def get(self, key, default=None):
            asked.add(key)
            return super().get(key, default)

        def keys(self):
            return self

        def __copy__(self):
            return Spy(self)

    deepspeed_config_class(Spy({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}))
    removed = set(pytest.importorskip("deepspeed.runtime.config")._REMOVED_TOP_LEVEL_CONFIG_KEYS)
    assert {"bf16", "zero_optimization", "tensorboard"} <= asked and "amp" in removed
    # These two are read outside its parser, only with sequence parallelism.
    assert (asked - removed) | {"sequence_parallel_size", "data_parallel_size"} == KNOWN_KEYS
    assert DECIDED_ELSEWHERE.keys() <= KNOWN_KEYS


def test_resolving_imports_neither_torch_nor_deepspeed():
    code = ("import sys; from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings; "
            "from gigatok_ds.config.load import load_recipe; "
            "resolve_deepspeed(zero_settings(1), load_recipe('GPT-B'), data_parallel_size=1); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
