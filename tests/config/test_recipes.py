"""The packaged recipes against the published hyper-parameters, and the command that shows them."""

import json
import re

import pytest
from places import GOLDEN

from gigatok_ds.checkpoint.original import build_on_meta, original_entry
from gigatok_ds.cli.main import main
from gigatok_ds.config.load import load_recipe, recipe_names, recipe_summary

# iterations, precision, "epochs" of 5000 iterations at batch 256. Not stated: the nearest model's.
TOKENIZERS = {
    "VQ_SS256": (1_000_000, "fp16", 100),
    "VQ_SB256": (2_000_000, "fp16", 200),
    "VQ_BL256": (1_000_000, "fp16", 200),
    "VQ_BL256_dino_disc": (1_000_000, "fp16", 200),
    "VQ_BL256_train_new": (1_000_000, "fp16", 200),
    "VQ_XLXXL256": (1_500_000, "bf16", 300),
    "VQ_SS256_2d": (1_000_000, "fp16", 100),
    "VQ_SB256_2d": (2_000_000, "fp16", 200),
    "VQ_BL256_2d": (1_000_000, "fp16", 200),
}
# batch, iterations, hold steps of the schedule, warm-up
GPTS = {
    "GPT-B": (256, 1_500_000, 1_200_000, 5000),
    "GPT-L": (256, 1_500_000, 1_200_000, 5000),
    "GPT-XL": (512, 750_000, 600_000, 200),
    "GPT-XXL": (512, 750_000, 600_000, 200),
}
DISCRIMINATORS = {"patchgan": "patchgan", "dinodisc": "dino"}
LAYERS_2D = {"TransformerLayer": "self", "TransformerDecoderLayer": "decoder"}


def manifest(name):
    return json.loads((GOLDEN / f"manifest_{name}.json").read_text())


def test_every_published_model_and_the_demo_pair_have_a_recipe():
    assert set(recipe_names()) == {*TOKENIZERS, *GPTS, "demo_tokenizer", "demo_gpt"}


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_called_like_its_file_and_points_at_no_files(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.kind == ("gpt" if "gpt" in name.lower() else "tokenizer")
    assert recipe.data.train is None and recipe.data.validation is None


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_networks_are_the_published_ones(name):
    options = manifest(name)["config"]["model"]["init_args"]
    model = load_recipe(name).model
    two_d = manifest(name)["config"]["model"]["model_cls"] == "VQVitModel2DPlus"
    assert model.layout == ("2d" if two_d else "1d")
    assert (model.encoder, model.decoder) == (options["encoder_size"], options["decoder_size"])
    assert (model.latent_tokens, model.z_channels) == (options["num_latent_tokens"], options["z_channels"])
    assert (model.image_size, model.dropout, model.qk_norm) == (256, options["dropout_p"], False)
    assert model.cnn.base_channels == 128 and model.cnn.residual_blocks == 2
    assert list(model.cnn.encoder_multipliers) == options["encoder_ch_mult"]
    assert list(model.cnn.decoder_multipliers) == options["decoder_ch_mult"]
    assert model.cnn.attention == options["use_attn"]
    assert model.cnn.adaptive_group_norm == options["adaptive_gn"]
    assert (model.cnn.upsample == "depth_to_space") == options["d2s_up"]
    quantizer = model.quantizer
    assert (quantizer.codebook_size, quantizer.codebook_dim) == (16384, options["codebook_embed_dim"])
    assert quantizer.l2_normalized == options["codebook_l2_norm"]
    assert quantizer.gradient == ("rotation" if options["rot"] else "straight_through")
    assert (model.semantic_head.depth, model.semantic_head.teacher_width) == (options["distill_depth"], 768)
    if two_d:
        assert model.layer_2d == LAYERS_2D[options.get("transformer_layer_type", "TransformerDecoderLayer")]
    else:
        assert options["multi_level_query_init"] and model.latent_query == "multi_level"
        assert model.grid_query == "first_token"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_losses_are_the_published_ones(name):
    config, loss = manifest(name)["config"], load_recipe(name).loss
    options, params = config["model"]["init_args"], config["loss"]["params"]
    assert (loss.reconstruction.kind, loss.reconstruction.weight) == ("l2", params["reconstruction_weight"])
    assert loss.perceptual.weight == params["perceptual_weight"]
    assert (loss.quantizer.codebook, loss.quantizer.commitment) == (1.0, options["commit_loss_beta"])
    assert (loss.quantizer.entropy, loss.quantizer.entropy_end_step) == (options["entropy_loss_ratio"], None)
    adversarial = loss.adversarial
    assert (adversarial.start_step, adversarial.weight) == (params["disc_start"], params["disc_weight"])
    assert adversarial.discriminator == DISCRIMINATORS[params["disc_type"]]
    assert adversarial.discriminator_loss == params["disc_loss"]
    assert adversarial.generator_loss == params["gen_adv_loss"]
    assert (adversarial.base_channels, adversarial.kernel_size) == (params["disc_dim"], params["kw"])
    assert adversarial.layers == 3
    if params["aux_loss_end"] == 0:
        assert loss.auxiliary is None
    else:
        assert loss.auxiliary.end_step == params["aux_loss_end"]
        assert loss.auxiliary.direct_reconstruction == params["use_direct_rec_loss"]
        assert loss.auxiliary.feature == options["fea_rec_loss_type"]
        assert loss.auxiliary.feature_weight == options["fea_rec_loss_weight"]
    assert (loss.semantic.teacher, loss.semantic.weight) == ("dinov2-vit-b", 0.5)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_training_is_the_published_one(name):
    trainer, recipe = manifest(name)["config"]["trainer"], load_recipe(name)
    iterations, precision, epochs = TOKENIZERS[name]
    assert (recipe.training.steps, recipe.training.precision) == (iterations, precision)
    assert recipe.training.global_batch_size == trainer["global_batch_size"]
    assert iterations * trainer["global_batch_size"] == epochs * 5000 * 256
    assert recipe.training.seed == trainer["global_seed"]
    optimizer, schedule = recipe.optimizer, recipe.schedule
    assert optimizer.lr == float(trainer["lr"]) and optimizer.weight_decay == float(trainer["weight_decay"])
    assert optimizer.betas == (trainer["beta1"], trainer["beta2"]) and optimizer.eps == 1e-8
    # XL-XXL was trained by the sharded trainer, which decided by names.
    decay = "not_norms" if name == "VQ_XLXXL256" else "everything"
    assert trainer["optimizer"] == "AdamW"
    assert (optimizer.kind, optimizer.max_grad_norm, optimizer.decay) == ("adamw", trainer["max_grad_norm"], decay)
    assert recipe.training.ema_decay is None, "the original's scripts never switch it on"
    assert (schedule.kind, schedule.end_lr) == (trainer["lr_scheduler"], float(trainer["end_lr"]))
    assert schedule.warmup_steps == trainer["warmup"]
    assert recipe.data.crop_scale == (0.8, 1.0) and recipe.data.flip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_no_published_tokenizer_has_causal_or_dynamic_length_settings(name):
    """They are in the released files, all switched off: there is nothing of them to train."""
    settings = manifest(name)["config"]["model"]["causal_settings"]
    assert settings["causal_type"] is None and settings["dynamic_level_range"] is None
    assert not settings["dynamic_length_train"] and settings["min_level"] == 0


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_called_norm_here_is_called_norm_there(name):
    """optimizer.decay not_norms decides by names, as the original does by its own."""
    model = load_recipe(name).model
    for ours, _ in build_on_meta(model).named_parameters():
        assert ("norm" in ours) == ("norm" in original_entry(model, ours)[0]), ours


@pytest.mark.parametrize("name", GPTS)
def test_gpt_networks_are_the_published_ones(name):
    config, shapes = manifest(name)["config"], manifest(name)["state_dict"]
    model = load_recipe(name).model
    size = model.transformer
    assert model.size == name
    assert (size.width, size.layers, size.heads) == (config["dim"], config["n_layer"], config["n_head"])
    assert shapes["tok_embeddings.weight"] == [model.vocab_size, size.width]
    assert shapes["positional_embedding"] == [model.sequence_length + 1, size.width]
    assert shapes["cls_embedding.embedding_table.weight"] == [model.num_classes + 1, size.width]
    assert shapes["layers.0.feed_forward.w1.weight"] == [model.ffn_width, size.width]
    assert (model.class_dropout, model.token_dropout, model.residual_dropout) == (0.1, 0.1, 0.1)
    assert (model.norm_eps, model.qk_norm) == (1e-5, False)


@pytest.mark.parametrize("name", GPTS)
def test_gpt_training_is_the_published_one(name):
    batch, iterations, hold, warmup = GPTS[name]
    recipe = load_recipe(name)
    training, optimizer, schedule = recipe.training, recipe.optimizer, recipe.schedule
    assert (training.global_batch_size, training.steps, training.precision) == (batch, iterations, "fp16")
    assert iterations * batch == 300 * 5000 * 256
    assert (schedule.kind, schedule.warmup_steps, schedule.decay_shape) == ("wsd", warmup, "sqrt")
    assert iterations - int(schedule.decay_fraction * iterations) == hold
    assert (optimizer.lr, optimizer.betas, optimizer.eps) == (1e-4, (0.9, 0.95), 1e-8)
    assert (optimizer.weight_decay, optimizer.decay, optimizer.max_grad_norm) == (0.05, "matrices", 1.0)


@pytest.mark.parametrize("name", [*TOKENIZERS, *GPTS])
def test_the_comment_states_the_true_size(name):
    number, unit = re.search(r"([\d.]+)([MB]) parameters", recipe_summary(name)).groups()
    exact = manifest(name)["parameters"] / {"M": 1e6, "B": 1e9}[unit]
    assert number == (f"{exact:.0f}" if unit == "M" else f"{exact:.1f}")


def test_the_demo_pair_fits_together_and_needs_nothing_from_elsewhere():
    tokenizer, gpt = load_recipe("demo_tokenizer"), load_recipe("demo_gpt")
    assert gpt.model.vocab_size == tokenizer.model.quantizer.codebook_size
    assert gpt.model.sequence_length == tokenizer.model.latent_tokens
    assert gpt.model.num_classes == 10
    assert tokenizer.training.precision == gpt.training.precision == "fp32"
    assert tokenizer.loss.perceptual is None and tokenizer.loss.semantic is None
    # The demo has to exercise the adversarial phase, and what comes before it.
    assert tokenizer.loss.adversarial.discriminator == "patchgan"
    assert 1 < tokenizer.loss.adversarial.start_step < tokenizer.training.steps
    assert max(tokenizer.training.steps, gpt.training.steps) <= 5000


def test_recipes_lists_name_kind_and_description(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert {line.split()[0]: line.split()[1] for line in lines}["GPT-B"] == "gpt"
    for line in lines:
        assert len(line.split(maxsplit=2)[2]) > 20


@pytest.mark.parametrize("name", recipe_names())
def test_what_recipes_prints_is_that_recipe(name, capsys, tmp_path):
    assert main(["recipes", name, "optimizer.lr=3e-5"]) == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_recipe(printed) == load_recipe(name, ["optimizer.lr=3e-5"])


def test_recipes_refuses_in_one_line(capsys):
    assert main(["recipes", "VQ_SS257"]) == 2
    message = "there is no recipe 'VQ_SS257' and no such YAML file; did you mean VQ_SS256?"
    assert capsys.readouterr().err == f"gigatok-ds recipes: error: {message}\n"
