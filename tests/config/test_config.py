"""Recipes are strict: whatever is not exactly right is one line that says what was meant."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gigatok_ds import InputError
from gigatok_ds.config.load import (
    differing_keys,
    load_recipe,
    recipe_names,
    recipe_to_dict,
    recipe_to_yaml,
    save_resolved,
)
from gigatok_ds.config.model import TransformerSize


@pytest.mark.parametrize("name", recipe_names())
def test_a_resolved_recipe_reads_back_equal(name, tmp_path):
    recipe = load_recipe(name)
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == recipe
    json.dumps(recipe_to_dict(recipe))


@pytest.mark.parametrize("override, words", [
    ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
    ("optimizer.betass=[0.9, 0.9]", "unknown key optimizer.betass; did you mean betas?"),
    ("model.cnn.residual_block=2", "did you mean residual_blocks?"),
    ("optimizer.lr=fast", "optimizer.lr is 'fast': input should be a valid number"),
    ("training.steps=1.5", "training.steps is 1.5: input should be a valid integer"),
    ("training.steps=true", "training.steps is True"),
    ("model.image_size='8'", "model.image_size is '8'"),
    ("training.steps=0", "training.steps is 0; it must be at least 1"),
    ("training.precision=fp8", "training.precision is 'fp8'"),
    ("model.cnn.residual_blocks=0", "cnn.encoder_multipliers are [1, 1, 2, 2, 4]; use at least one residual block"),
    ("model.encoder=huge", "encoder: unknown size 'huge'; choose one of tiny, small"),
    ("model.encoder={widht: 64, layers: 1, heads: 1}", "model.encoder.width is missing"),
    ("loss.semantic=null", "loss.semantic and model.semantic_head go together"),
    ("data.crop_scale=[0.9]", "data.crop_scale"),
    ("training", "not of the form key.sub=value"),
    ("model.encoder=[1", "not valid YAML"),
])
def test_wrong_overrides_are_one_clear_line(override, words):
    with pytest.raises(InputError) as error:
        load_recipe("VQ_SS256", [override])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_overrides_are_yaml_and_create_sections():
    recipe = load_recipe("VQ_XLXXL256", ["optimizer.lr=3e-4", "loss.auxiliary.end_step=7", "model.semantic_head=null",
                                         "loss.semantic=null", "model.encoder={width: 64, layers: 2, heads: 1}"])
    assert recipe.optimizer.lr == 3e-4
    assert recipe.loss.auxiliary.end_step == 7 and recipe.loss.semantic is None
    assert recipe.model.encoder_size.width == 64


def write(folder: Path, text: str) -> str:
    (folder / "mine.yaml").write_text(text)
    return str(folder / "mine.yaml")


def test_a_recipe_inherits_and_null_replaces(tmp_path):
    mine = load_recipe(write(tmp_path,
                             "base: VQ_SS256\nname: mine\nloss: {adversarial: null}\nmodel: {decoder: base}\n"))
    theirs = load_recipe("VQ_SS256")
    assert mine.loss.adversarial is None and mine.model.decoder == "base"
    assert mine.loss.perceptual == theirs.loss.perceptual and mine.model.encoder == theirs.model.encoder


@pytest.mark.parametrize("text, words", [
    ("kind: tokenizer\nkind: gpt\n", "line 2: the key 'kind' appears twice"),
    ("a: [1\nb: 2\n", "line 2"),
    ("- 1\n", "a mapping"),
    ("kind: vae\n", "kind is 'vae'; it must be one of tokenizer, gpt"),
    ("kind: gpt\nname: x\nmodel: {size: GPT-B}\n", "training is missing"),
    ("base: VQ_SS25\n", "did you mean VQ_SS256?"),
])
def test_broken_files_are_refused(tmp_path, text, words):
    with pytest.raises(InputError, match="(?s)" + words.replace("?", r"\?")):
        load_recipe(write(tmp_path, text))


def test_a_recipe_cannot_inherit_from_itself(tmp_path):
    path = write(tmp_path, "")
    Path(path).write_text(yaml.safe_dump({"base": path}))
    with pytest.raises(InputError, match="inherits from itself"):
        load_recipe(path)


def test_unknown_names_suggest_the_nearest():
    with pytest.raises(InputError, match=r"no recipe 'VQ_SS265'.*did you mean VQ_SS256\?"):
        load_recipe("VQ_SS265")


def refused(name, *overrides):
    """The message of a recipe that must not load; always a single line."""
    with pytest.raises(InputError) as caught:
        load_recipe(name, overrides)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def recipe_file(tmp_path):
    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


# Overrides


@pytest.mark.parametrize(("override", "value"), [
    ("optimizer.lr=1e-4", 1e-4),
    ("optimizer.lr=2.5E-05", 2.5e-5),
    ("optimizer.lr=.5e1", 5.0),
    ("optimizer.lr=1", 1.0),
    ("optimizer.betas=[0.5, 1e-1]", (0.5, 0.1)),
    ("training.steps=1_000", 1000),
    ("training.micro_batch_size=8", 8),
    ("training.micro_batch_size=null", None),
    ("data.flip=false", False),
    ("data.train=shards/a=b", "shards/a=b"),
    ("data.train=2024-01-31", "2024-01-31"),
    ("data.train='1e5'", "1e5"),
    ("loss.perceptual=null", None),
    ("model.cnn.encoder_multipliers=[1, 2, 2, 2, 4]", (1, 2, 2, 2, 4)),
    ("model.encoder={width: 64, layers: 3, heads: 2}", TransformerSize(width=64, layers=3, heads=2)),
])
def test_overrides_are_yaml_values(override, value):
    found = load_recipe("VQ_SS256", [override])
    for name in override.split("=")[0].split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


def test_the_last_override_wins_and_the_rest_stays():
    recipe = load_recipe("VQ_SS256", ["training.steps=5", "training.steps=7"])
    assert recipe.training == dataclasses.replace(load_recipe("VQ_SS256").training, steps=7)
    assert recipe.model == load_recipe("VQ_SS256").model


def test_an_override_creates_a_section_that_is_null():
    assert load_recipe("demo_tokenizer").loss.perceptual is None
    recipe = load_recipe("demo_tokenizer", ["loss.perceptual.weight=0.5"])
    assert recipe.loss.perceptual.weight == 0.5 and recipe.loss.perceptual.dropout is False
    # What has no default has to be given too.
    weight = "loss.auxiliary.feature_weight=2.0"
    assert "loss.auxiliary.end_step is missing" in refused("VQ_XLXXL256", weight)
    both = load_recipe("VQ_XLXXL256", [weight, "loss.auxiliary.end_step=9"])
    assert (both.loss.auxiliary.end_step, both.loss.auxiliary.feature_weight) == (9, 2.0)


def test_a_named_size_can_be_spelled_out_key_by_key():
    size = ["model.encoder.width=64", "model.encoder.heads=2", "model.encoder.layers=1"]
    assert load_recipe("VQ_SS256", size).model.encoder == TransformerSize(width=64, layers=1, heads=2)
    assert "model.encoder.layers is missing" in refused("VQ_SS256", *size[:2])


@pytest.mark.parametrize("override", ["optimizer.lr", "=3", "optimizer.=3", ".lr=3", "optimizer..lr=3", ""])
def test_overrides_without_key_or_value_are_refused(override):
    assert "is not of the form key.sub=value" in refused("VQ_SS256", override)


def test_overrides_below_a_value_and_broken_values_are_refused():
    assert "kind has no settings of its own" in refused("VQ_SS256", "kind.x=1")
    message = refused("VQ_SS256", "data.train=[1")
    assert "data.train=[1" in message and "quote the value" in message
    assert "invalid literal" in refused("VQ_SS256", "training.steps=!!int abc")
    assert "only text, numbers" in refused("VQ_SS256", "data.train=!!set {a}")
    assert len(refused("VQ_SS256", "training.steps=" + "9" * 5000)) < 400


# Strictness


@pytest.mark.parametrize(("override", "message"), [
    ("training.steps=8.0", "training.steps is 8.0: input should be a valid integer"),
    ('training.steps="8"', "training.steps is '8': input should be a valid integer"),
    ("training.steps=010", "training.steps is '010': input should be a valid integer"),
    ("training.steps=true", "training.steps is True: input should be a valid integer"),
    ("training.steps=null", "training.steps is None: input should be a valid integer"),
    ("optimizer.lr=true", "optimizer.lr is True: input should be a valid number"),
    ('optimizer.lr="1e-4"', "optimizer.lr is '1e-4': input should be a valid number"),
    ("optimizer.lr=.nan", "optimizer.lr is nan: input should be a finite number"),
    ("optimizer.lr=.inf", "optimizer.lr is inf: input should be a finite number"),
    ("data.flip=1", "data.flip is 1: input should be a valid boolean"),
    ("name=1e5", "name is 100000.0: input should be a valid string"),
    ("training.precision=16", "training.precision is 16: input should be 'fp32', 'bf16' or 'fp16'"),
    ("loss.reconstruction.kind=L2", "loss.reconstruction.kind is 'L2': input should be 'l1' or 'l2'"),
    ("kind=gpt", "kind is 'gpt': input should be 'tokenizer'"),
    ("training=3", "training is 3: input should be an object"),
    ("optimizer.betas=[0.9]", "optimizer.betas.1 is missing"),
    ("optimizer.betas=[a, 0.9]", "optimizer.betas.0 is 'a': input should be a valid number"),
    ("model.encoder=5",
     "model.encoder is 5: input should be a valid string, or a section of width, layers, heads"),
    ("model.encoder={width: 64, layers: a, heads: 2}",
     "model.encoder.layers is 'a': input should be a valid integer"),
])
def test_wrong_types_name_key_value_and_what_is_allowed(override, message):
    assert refused("VQ_SS256", override) == f"VQ_SS256: {message}"


@pytest.mark.parametrize(("override", "message"), [
    ("optimiser.lr=1", "unknown key optimiser; did you mean optimizer?"),
    ("optimizer.weigth_decay=1", "unknown key optimizer.weigth_decay; did you mean weight_decay?"),
    ("model.cnn.Base_Channels=1",
     "unknown key model.cnn.Base_Channels; did you mean base_channels?"),
    ("model.semantic_head.deepth=1",
     "unknown key model.semantic_head.deepth; did you mean depth?"),
    ("lr=1", "unknown key lr; did you mean optimizer.lr?"),
    ("training.warmup_steps=1", "unknown key training.warmup_steps; did you mean schedule.warmup_steps?"),
    ("schedule.zzz=1",
     "unknown key schedule.zzz; allowed are kind, warmup_steps, end_lr, decay_fraction, decay_shape"),
    ("str=1", "unknown key str; allowed are kind, name, model, loss, training, optimizer, schedule, data, "
     "checkpoint, parallel, validation, monitor, faults"),
])
def test_unknown_keys_name_the_nearest(override, message):
    assert refused("VQ_SS256", override) == f"VQ_SS256: {message}"


def test_unknown_keys_inside_a_spelled_out_size():
    message = refused("VQ_SS256", "model.encoder={width: 64, layer: 2, heads: 2}")
    assert message == ("VQ_SS256: unknown key model.encoder.layer; did you mean layers?; "
                       "model.encoder.layers is missing")


def test_missing_keys_are_named(recipe_file):
    message = refused(recipe_file("kind: gpt\nname: x\nmodel: {size: GPT-B}\n"))
    assert message.endswith("mine.yaml: training is missing")
    message = refused(recipe_file("kind: gpt\nname: x\nmodel: {}\ntraining: {steps: 1}\n"))
    assert "model.size is missing; training.global_batch_size is missing" in message


def test_many_problems_are_counted():
    overrides = [f"optimizer.{name}=x" for name in ("lr", "betas", "eps", "weight_decay", "decay")]
    assert refused("VQ_SS256", *overrides).endswith("(and 2 more)")


@pytest.mark.parametrize(("override", "message"), [
    ("loss.semantic=null",
     "loss.semantic and model.semantic_head go together: set both, or set both to null"),
    ("model.encoder=huge", "encoder: unknown size 'huge'; choose one of tiny, small, base"),
    ("model.encoder={width: 65, layers: 2, heads: 2}",
     "transformer width 65 is not a multiple of its 2 heads"),
    ("model.encoder={width: 64, layers: 2, heads: 0}", "transformer.heads is 0; it must be at least 1"),
    ("model.cnn.base_channels=48", "cnn.base_channels is 48; it must be a multiple of 32"),
    ("model.cnn.encoder_multipliers=[1, 1, 2, 2, 0]", "cnn.multipliers is 0; it must be at least 1"),
    ("model.quantizer.codebook_size=0", "quantizer.codebook_size is 0; it must be at least 1"),
    ("model.dropout=1.0", "model.dropout is 1.0; it must be at least 0 and below 1"),
    ("training.steps=0", "training.steps is 0; it must be at least 1"),
    ("training.micro_batch_size=0", "training.micro_batch_size is 0; it must be at least 1"),
    ("optimizer.lr=-1.0", "optimizer.lr is -1.0; it must be at least 0"),
    ("optimizer.betas=[0.9, 1.0]", "optimizer.betas.1 is 1.0; it must be at least 0 and below 1"),
    ("schedule.decay_fraction=1.5", "schedule.decay_fraction is 1.5; it must be between 0 and 1"),
    ("data.workers=-1", "data.workers is -1; it must be at least 0"),
    ("data.crop_scale=[0.5, 2]", "data.crop_scale is (0.5, 2.0); it must be 0 < low <= high <= 1"),
])
def test_what_the_schemas_refuse_comes_through(override, message):
    assert refused("VQ_SS256", override).startswith(f"VQ_SS256: {message}")


# Files


def test_unknown_recipes_name_the_nearest(tmp_path):
    assert refused("VQ_SS25") == "there is no recipe 'VQ_SS25' and no such YAML file; did you mean VQ_SS256?"
    assert refused("gpt-xl").endswith("did you mean GPT-XL?")
    assert refused(tmp_path / "demo_gp.yaml").endswith("did you mean demo_gpt?")
    assert refused("q").endswith(f"recipes are {', '.join(recipe_names())}")
    assert "no such YAML file" in refused(tmp_path)


def test_inheritance_merges_sections_and_null_replaces_them(recipe_file):
    path = recipe_file("base: VQ_SS256\nname: mine\nloss: {semantic: null, quantizer: {entropy: 1e-2}}\n"
                       "model: {semantic_head: null, encoder: {width: 64, layers: 2, heads: 2}}\n")
    recipe, base = load_recipe(path), load_recipe("VQ_SS256")
    assert recipe.name == "mine" and recipe.training == base.training
    assert recipe.loss.semantic is None and recipe.model.semantic_head is None
    assert recipe.loss.quantizer == dataclasses.replace(base.loss.quantizer, entropy=0.01)
    assert recipe.loss.adversarial == base.loss.adversarial
    assert recipe.model.encoder == TransformerSize(width=64, layers=2, heads=2)
    assert recipe.model.decoder == "small"


def test_inheritance_follows_files_relative_to_the_heir(recipe_file, tmp_path, monkeypatch):
    recipe_file("base: GPT-B\nname: parent\ntraining: {steps: 5}\n", "parent.yaml")
    child = recipe_file("base: parent.yaml\nname: child\ntraining: {seed: 3}\n", "child.yaml")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    training = load_recipe(child).training
    assert (training.steps, training.seed, training.global_batch_size) == (5, 3, 256)


def test_inheritance_mistakes(recipe_file):
    assert "inherits from itself" in refused(recipe_file("base: mine.yaml\nname: x\n"))
    recipe_file("base: mine.yaml\n", "other.yaml")
    assert "other.yaml" in refused(recipe_file("base: other.yaml\nname: x\n"))
    assert "did you mean GPT-B?" in refused(recipe_file("base: GPT-BB\nname: x\n"))
    assert "base is 3" in refused(recipe_file("base: 3\n"))
    other_kind = recipe_file("base: VQ_SS256\nkind: gpt\nname: x\nmodel: {size: GPT-B}\n")
    assert refused(other_kind).endswith("kind is 'gpt', but its base VQ_SS256 is 'tokenizer'")


@pytest.mark.parametrize(("text", "message"), [
    ("kind: gpt\nname: [1\nmodel: 2\n", "mine.yaml line 3: expected ',' or ']'"),
    ("kind: gpt\n\tname: x\n", "mine.yaml line 2: found character '\\t'"),
    ("base: GPT-B\nname: x\nname: y\n", "mine.yaml line 3: the key 'name' appears twice"),
    ("base: GPT-B\ntraining:\n  steps: 1\n  seed: 2\n  'steps': 3\n",
     "mine.yaml line 5: the key 'steps' appears twice"),
    ("base: GPT-B\n? [1]\n: 2\n", "mine.yaml line 2: found unhashable key"),
    ("base: GPT-B\nname: !!python/name:os.system x\n", "mine.yaml line 2: could not determine a constructor"),
    ("base: GPT-B\nname: \x01\n", "unacceptable character"),
    (b"\xff\xfe\x00", "mine.yaml is not a YAML text file"),
    ("", "mine.yaml is not a recipe: a mapping"),
    ("- 1\n", "mine.yaml is not a recipe: a mapping"),
    ("name: x\n", "mine.yaml: kind is None; it must be one of tokenizer, gpt"),
    ("kind: [gpt]\n", "mine.yaml: kind is ['gpt']; it must be one of tokenizer, gpt"),
])
def test_malformed_files_are_one_line(recipe_file, text, message):
    assert message in refused(recipe_file(text))


def test_anchors_do_not_tie_sections_together(recipe_file):
    path = recipe_file("base: VQ_SS256\nname: x\n"
                       "model: {encoder: &size {width: 64, layers: 4, heads: 2}, decoder: *size}\n")
    model = load_recipe(path, ["model.encoder.width=128"]).model
    assert (model.encoder.width, model.decoder.width) == (128, 64)


# Saving


@pytest.mark.parametrize("text", [
    "1e5", "010", "0x1f", "1_0", "1:30", "2024-01-31", "null", "~", "yes", "", " a ", "é", "a: b", "# x",
    "a\nb", "*x", "!y", "GPT-B", ".nan", "-", "'", "long " * 60,
])
def test_text_survives_saving(text, tmp_path):
    recipe = dataclasses.replace(load_recipe("GPT-B"), name=text)
    save_resolved(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_recipe_to_dict_is_plain_and_complete():
    recipe = load_recipe("VQ_SS256", ["model.encoder={width: 64, layers: 2, heads: 2}"])
    plain = recipe_to_dict(recipe)
    assert plain["optimizer"]["betas"] == [0.9, 0.95]
    assert plain["model"]["encoder"] == {"width": 64, "layers": 2, "heads": 2}
    assert plain["model"]["cnn"]["upsample"] == "depth_to_space"
    assert yaml.safe_load(recipe_to_yaml(recipe))["training"] == plain["training"]


def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    target = tmp_path / "recipe.yaml"
    save_resolved(load_recipe("GPT-B"), target)
    before = target.read_bytes()

    def no_space(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", no_space)
    with pytest.raises(OSError, match="No space"):
        save_resolved(load_recipe("GPT-L"), target)
    assert target.read_bytes() == before
    assert list(tmp_path.iterdir()) == [target]


def test_loading_needs_no_torch():
    code = ("import sys; from gigatok_ds.config.load import load_recipe; load_recipe('VQ_SS256'); "
            "sys.exit(any(name in sys.modules for name in ('torch', 'deepspeed', 'numpy')))")
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_may_be_resumed_at_another_layout_but_not_with_another_recipe():
    recipe = load_recipe("VQ_SS256")
    layout = ["parallel.tensor=2", "parallel.recompute_every=1", "training.micro_batch_size=2",
              "training.precision=fp32", "checkpoint.every=7", "checkpoint.asynchronous=true", "training.log_every=3"]
    assert differing_keys(recipe, load_recipe("VQ_SS256", layout)) == []
    other = ["training.seed=1", "optimizer.lr=1.0", "loss.quantizer.commitment=2.0"]
    assert sorted(differing_keys(recipe, load_recipe("VQ_SS256", [*layout, *other]))) == [
        "loss.quantizer.commitment", "optimizer.lr", "training.seed"]


def test_a_recipe_in_fp16_hears_of_bf16_where_a_gpu_has_it():
    from gigatok_ds.precision import precision_note

    precision = load_recipe("VQ_SS256").training.precision
    assert precision == "fp16", "as published"
    assert "training.precision=bf16 is the safer choice" in precision_note(precision, True)
    assert [precision_note(precision, False), precision_note("bf16", True), precision_note("fp32", True)] == [None] * 3
