"""Every option of the tokenizer runs forward and backward, and keeps its shapes."""

import pytest
import torch
from small_models import SMALL, small_tokenizer, small_tokenizer_config

from gigatok_ds import InputError
from gigatok_ds.checkpoint.original import from_original, to_original
from gigatok_ds.config.model import CNNConfig
from gigatok_ds.models.latent_encoder import multi_level_pool

CNN = dict(base_channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), residual_blocks=1)
VARIANTS = {
    "1d": {},
    "2d decoder": {"layout": "2d", "latent_tokens": 64},
    "2d self": {"layout": "2d", "latent_tokens": 64, "layer_2d": "self"},
    "2d double self": {"layout": "2d", "latent_tokens": 64, "layer_2d": "double_self"},
    "learned queries": {"latent_query": "learned", "grid_query": "learned"},
    "mean query": {"latent_query": "mean", "latent_tokens": 7},
    "qk norm": {"qk_norm": True},
    "no semantic head": {"semantic_head": None},
    "cnn attention": {"cnn": CNNConfig(attention=True, **CNN)},
    "nearest upsampling": {"cnn": CNNConfig(upsample="nearest", adaptive_group_norm=False, **CNN)},
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_forward_backward_and_round_trip_to_the_originals_names(changes):
    model = small_tokenizer(**changes).train()
    images = torch.randn(2, 3, 16, 16)
    output = model(images, entropy="global", semantic=model.config.semantic_head is not None, direct=True)
    tokens = model.config.latent_tokens
    assert output.reconstruction.shape == output.direct_reconstruction.shape == images.shape
    assert output.codes.shape == (2, tokens)
    loss = output.reconstruction.square().mean() + output.direct_reconstruction.mean() + sum(output.quantizer_losses)
    if output.semantic_feature is not None:
        assert output.semantic_feature.shape == (2, 64, 24)
        loss = loss + output.semantic_feature.mean()
    loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without
    config, weights = from_original(model.config, to_original(model.config, model.state_dict()), "here")
    assert config == model.config
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_images_of_another_shape(changes):
    """16 x 24 pixels in cells of 2, after which the model's own shape is what it was but for rounding."""
    model, images = small_tokenizer(**changes), torch.rand(2, 3, 16, 24) * 2 - 1
    before = model.encode(images[..., :16]), model.decode(model.encode(images[..., :16]))
    model.set_image_shape(16, 24)
    codes = model.encode(images)
    assert codes.shape == (2, model.latent_tokens) and model.latent_tokens == (
        96 if model.config.layout == "2d" else model.config.latent_tokens)
    assert model.decode(codes).shape == images.shape and model.decode(codes).isfinite().all()
    assert model.encode(images[:0]).shape == (0, model.latent_tokens)
    with pytest.raises(InputError, match=r"takes \(batch, 3, 16, 24\)"):
        model.encode(images.transpose(2, 3))
    same = small_tokenizer(**changes)
    same.set_image_shape(16, 16)
    assert torch.equal(same.encode(images[..., :16]), before[0])
    assert torch.allclose(same.decode(before[0]), before[1], atol=1e-5)


def test_a_shape_that_cells_do_not_divide_is_refused_with_the_nearest():
    with pytest.raises(InputError, match=r"images of 17 x 24 cannot be cut .* cells of 2 x 2 pixels; .* is 16 x 24"):
        small_tokenizer().set_image_shape(17, 24)
    with pytest.raises(InputError, match="nearest size is 2 x 24"):
        small_tokenizer().set_image_shape(1, 24)


def test_positions_of_another_shape_keep_their_directions():
    """A table that grows from left to right still does, and no other way."""
    model = small_tokenizer()
    rows, columns = model.decoder.grid
    ramp = torch.arange(columns).float().expand(rows, columns).reshape(-1, 1, 1)
    with torch.no_grad():
        model.decoder.positional_embedding.copy_(ramp.expand_as(model.decoder.positional_embedding))
    model.set_image_shape(32, 24)
    table = model.decoder.positional_embedding[:, 0, 0].reshape(16, 12)
    assert (table.diff(dim=1) > 0).all() and torch.allclose(table, table[:1].expand(16, 12), atol=1e-5)


def test_pooling_of_a_map_that_cells_do_not_divide():
    """Of six columns the sixteen cells of level 5 take those that they lie in: torch's adaptive pooling."""
    grid = torch.arange(36).reshape(1, 1, 6, 6).float()
    pooled = multi_level_pool(grid, 32).flatten()
    assert pooled.shape == (32,) and pooled[0] == pooled[1] == 17.5
    assert pooled[16:].tolist() == torch.nn.functional.adaptive_avg_pool2d(grid, 4).flatten().tolist()


def test_multi_level_pooling_of_a_known_map():
    grid = (16 * torch.arange(16)[:, None] + torch.arange(16)).float()[None, None]
    pooled = multi_level_pool(grid, 256).flatten()
    assert pooled.shape == (256,)
    assert pooled[:12].tolist() == [127.5, 127.5, 123.5, 131.5, 59.5, 67.5, 187.5, 195.5, 57.5, 61.5, 65.5, 69.5]


def test_decode_uses_the_exact_code_and_agrees_with_the_forward_pass():
    model = small_tokenizer()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        output = model(images)
    assert torch.allclose(model.decode(output.codes), output.reconstruction, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 1, 16, 16), (3, 16, 16)])
def test_images_of_the_wrong_size_are_refused(shape):
    with pytest.raises(InputError, match=r"this tokenizer takes \(batch, 3, 16, 16\)"):
        small_tokenizer().encode(torch.randn(shape))


def test_codes_of_the_wrong_length_are_refused():
    with pytest.raises(InputError, match=r"takes \(batch, 8\)"):
        small_tokenizer().decode(torch.zeros(1, 9, dtype=torch.long))


@pytest.mark.parametrize("changes, words", [
    ({"image_size": 17}, "not a multiple of the CNN's downscale"),
    ({"layout": "2d", "latent_tokens": 8}, "one per grid cell, 64"),
    ({"latent_tokens": 12}, "power of two"),
    ({"latent_tokens": 256}, "next are 128"),
    ({"encoder": "gigantic"}, "unknown size 'gigantic'"),
    ({"cnn": CNNConfig(base_channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2)),
      "decoder": SMALL, "semantic_head": None, "image_size": 0}, "image_size"),
])
def test_configurations_that_cannot_work_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        small_tokenizer_config(**changes)
