"""DeepSpeed settings: every `auto` is resolved, every conflict refused, and nothing is left to DeepSpeed's defaults."""

import json
from pathlib import Path

import pytest

from gigatok_ds import InputError
from gigatok_ds.config.deepspeed import resolve_deepspeed, zero3_worth_it, zero_settings
from gigatok_ds.config.load import load_recipe

FOLDER = Path(__file__).parent.parent / "ds_configs"
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


def test_batches_that_do_not_divide_are_explained():
    with pytest.raises(InputError, match="global_batch_size 128 is not a multiple of 3 data ranks x micro batch 42"):
        resolve_deepspeed(zero_settings(1), RECIPE, data_parallel_size=3)


def test_what_is_silently_wrong_or_useless_is_said():
    hpz = zero_settings(3)
    hpz["zero_optimization"]["zero_hpz_partition_size"] = 8
    resolve_deepspeed(hpz, RECIPE, data_parallel_size=8)
    with pytest.raises(InputError, match="zero_hpz_partition_size with tensor parallelism"):
        resolve_deepspeed(hpz, RECIPE, data_parallel_size=8, tensor_parallel_size=2)
    useless = zero_settings(1) | {"activation_checkpointing": {"partition_activations": True}}
    assert "partition_activations does nothing" in resolve_deepspeed(useless, RECIPE, data_parallel_size=8)[1][0]
    assert "136M" in zero3_worth_it(136_000_000) and zero3_worth_it(2_900_000_000) is None


def test_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(InputError, match="there is no DeepSpeed settings file"):
        resolve_deepspeed(tmp_path / "none.json", RECIPE, data_parallel_size=1)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        resolve_deepspeed(tmp_path / "broken.json", RECIPE, data_parallel_size=1)
