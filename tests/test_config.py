"""Recipes are strict: whatever is not exactly right is one line that says what was meant."""

import json
from pathlib import Path

import pytest
import yaml
from golden_models import manifest

from gigatok_ds import InputError
from gigatok_ds.config.load import load_recipe, recipe_names, recipe_to_dict, save_resolved

TOKENIZERS = ["VQ_SS256", "VQ_SB256", "VQ_BL256", "VQ_BL256_dino_disc", "VQ_BL256_train_new", "VQ_XLXXL256",
              "VQ_SS256_2d", "VQ_SB256_2d", "VQ_BL256_2d"]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_recipes_say_what_the_originals_say(name):
    recipe, original = load_recipe(name), manifest(name)["config"]
    model, trainer, loss = original["model"]["init_args"], original["trainer"], original["loss"]["params"]
    ours = recipe.model
    assert (ours.encoder, ours.decoder) == (model["encoder_size"], model["decoder_size"])
    assert ours.layout == ("2d" if original["model"]["model_cls"] == "VQVitModel2DPlus" else "1d")
    assert (ours.latent_tokens, ours.z_channels, ours.dropout) == (model["num_latent_tokens"], model["z_channels"], 0)
    assert list(ours.cnn.encoder_multipliers) == model["encoder_ch_mult"]
    assert list(ours.cnn.decoder_multipliers) == model["decoder_ch_mult"]
    assert ours.cnn.adaptive_group_norm and model["adaptive_gn"] and model["d2s_up"] and not model["use_attn"]
    assert ours.quantizer.codebook_size == model["codebook_size"]
    assert ours.quantizer.codebook_dim == model["codebook_embed_dim"]
    assert (ours.quantizer.gradient == "rotation") == model["rot"]
    assert ours.semantic_head.depth == model["distill_depth"]
    layers = {None: "decoder", "TransformerDecoderLayer": "decoder", "TransformerLayer": "self"}
    assert ours.layer_2d == layers[model.get("transformer_layer_type")]
    assert recipe.loss.quantizer.commitment == model["commit_loss_beta"]
    assert recipe.loss.quantizer.entropy == model["entropy_loss_ratio"]
    check_training(recipe, trainer)
    check_losses(recipe.loss, loss, model)


def check_training(recipe, trainer):
    assert recipe.training.global_batch_size == trainer["global_batch_size"]
    assert recipe.optimizer.lr == float(trainer["lr"])
    assert recipe.optimizer.betas == (trainer["beta1"], trainer["beta2"])
    assert recipe.optimizer.weight_decay == float(trainer["weight_decay"])
    assert recipe.optimizer.max_grad_norm == trainer["max_grad_norm"]
    assert recipe.schedule.kind == trainer["lr_scheduler"]
    assert recipe.schedule.end_lr == float(trainer["end_lr"])
    assert recipe.schedule.warmup_steps == trainer["warmup"]


def check_losses(ours, original, model):
    adversarial, auxiliary = ours.adversarial, ours.auxiliary
    assert adversarial.start_step == original["disc_start"] and adversarial.weight == original["disc_weight"]
    assert adversarial.discriminator == {"patchgan": "patchgan", "dinodisc": "dino"}[original["disc_type"]]
    assert adversarial.discriminator_loss == original["disc_loss"]
    assert adversarial.generator_loss == original["gen_adv_loss"]
    assert (adversarial.base_channels, adversarial.kernel_size) == (original["disc_dim"], original["kw"])
    assert ours.perceptual.weight == original["perceptual_weight"]
    assert ours.reconstruction.kind == original["reconstruction_loss"]
    assert ours.reconstruction.weight == original["reconstruction_weight"]
    assert ours.semantic.weight == 0.5 and ours.semantic.teacher == "dinov2-vit-b"
    if original["aux_loss_end"]:
        assert auxiliary.end_step == original["aux_loss_end"]
        assert auxiliary.direct_reconstruction == original["use_direct_rec_loss"]
        assert (auxiliary.feature, auxiliary.feature_weight) == (model["fea_rec_loss_type"], model["fea_rec_loss_weight"])
    else:
        assert auxiliary is None


# Steps and precision as documented: epochs * 5000 * 256 / batch; see losses_and_training and the AR recipes.
@pytest.mark.parametrize("name, steps, batch, precision", [
    ("VQ_SS256", 1_000_000, 128, "fp16"),
    ("VQ_SB256", 2_000_000, 128, "fp16"),
    ("VQ_BL256", 1_000_000, 256, "fp16"),
    ("VQ_XLXXL256", 1_500_000, 256, "bf16"),
    ("GPT-B", 1_500_000, 256, "fp16"),
    ("GPT-XXL", 750_000, 512, "fp16"),
])
def test_published_lengths(name, steps, batch, precision):
    training = load_recipe(name).training
    assert (training.steps, training.global_batch_size, training.precision) == (steps, batch, precision)


def test_gpt_recipes():
    for name, warmup in (("GPT-B", 5000), ("GPT-XXL", 200)):
        recipe = load_recipe(name)
        assert recipe.schedule.kind == "wsd" and recipe.schedule.decay_fraction == 0.2
        assert recipe.schedule.warmup_steps == warmup
        assert recipe.optimizer.weight_decay == 0.05 and recipe.optimizer.decay == "matrices"
        assert recipe.optimizer.max_grad_norm == 1.0 and recipe.optimizer.lr == 1e-4
        assert recipe.model.class_dropout == recipe.model.token_dropout == recipe.model.residual_dropout == 0.1


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
    mine = load_recipe(write(tmp_path, "base: VQ_SS256\nname: mine\nloss: {adversarial: null}\nmodel: {decoder: base}\n"))
    theirs = load_recipe("VQ_SS256")
    assert mine.loss.adversarial is None and mine.model.decoder == "base"
    assert mine.loss.perceptual == theirs.loss.perceptual and mine.model.encoder == theirs.model.encoder


@pytest.mark.parametrize("text, words", [
    ("kind: tokenizer\nkind: gpt\n", "line 1: the key 'kind' appears twice"),
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
