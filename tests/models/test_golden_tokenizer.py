"""The tokenizers against vectors made by running the original (S-S, 1-D and 2-D, at full size)."""

import numpy as np
import pytest
import torch
from golden_models import arrays, golden_model, manifest
from golden_weights import image

from gigatok_ds.checkpoint.original import build_on_meta, to_original
from gigatok_ds.config.load import load_recipe

TOKENIZERS = ["VQ_SS256", "VQ_SB256", "VQ_BL256", "VQ_BL256_dino_disc", "VQ_BL256_train_new", "VQ_XLXXL256",
              "VQ_SS256_2d", "VQ_SB256_2d", "VQ_BL256_2d"]
GENERATORS = ["GPT-B", "GPT-L", "GPT-XL", "GPT-XXL"]


@pytest.mark.parametrize("name", TOKENIZERS + GENERATORS)
def test_recipe_builds_the_published_names_shapes_and_parameter_count(name):
    config = load_recipe(name).model
    network = build_on_meta(config)
    expected = manifest(name)
    shapes = {key: list(value.shape) for key, value in to_original(config, network.state_dict()).items()}
    assert shapes == expected["state_dict"]
    assert sum(parameter.numel() for parameter in network.parameters()) == expected["parameters"]


@pytest.fixture(scope="module", params=["VQ_SS256", "VQ_SS256_2d"])
def case(request):
    config = load_recipe(request.param).model
    model = golden_model(config)
    images = torch.from_numpy(image("golden/image", (2, 3, 256, 256)))
    latents = []
    model.quantizer.register_forward_pre_hook(lambda quantizer, inputs: latents.append(inputs[0]))
    with torch.no_grad():
        output = model(images, semantic=True)
    return model, arrays(f"tokenizer_{request.param}"), images, latents[0], output


def assert_close(ours, golden, tolerance=1e-4):
    np.testing.assert_allclose(ours.detach().numpy(), golden, rtol=0, atol=tolerance)


def test_every_stage_matches(case):
    _, golden, _, latent, output = case
    assert list(latent.shape) == golden["quant_shape"].tolist()
    assert_close(output.cnn_feature[:, ::16, ::4, ::4], golden["cnn_feature"])
    assert_close(latent.reshape(golden["latent"].shape), golden["latent"])
    assert_close(output.semantic_feature[:, ::8, ::16], golden["semantic_feature"])
    assert_close(output.reconstruction[:, :, ::8, ::8], golden["reconstruction"])
    mean, std = golden["reconstruction_mean_std"]
    assert output.reconstruction.double().mean().item() == pytest.approx(mean, abs=1e-5)
    assert output.reconstruction.double().std().item() == pytest.approx(std, abs=1e-5)


def test_codes_are_equal_wherever_the_margin_is_not_a_tie(case):
    model, golden, images, _, output = case
    clear = golden["margin"] > 1e-5
    assert clear.mean() > 0.99
    assert (output.codes.numpy() == golden["indices"])[clear].all()
    assert torch.equal(model.encode(images[:1]), output.codes[:1])


def test_codes_decode_to_the_same_image(case):
    model, golden, *_ = case
    decoded = model.decode(torch.from_numpy(golden["indices"][:1].astype(np.int64)))
    assert_close(decoded[:, :, ::8, ::8], golden["reconstruction_from_codes"][:1])
