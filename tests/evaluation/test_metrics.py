"""Metrics against direct computations and closed forms."""

import io
import math

import numpy as np
import pytest
import skimage.data
import torch
from golden_weights import image
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gigatok_ds.data.transforms import pixels_of, scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.classifier import ImageClassifier
from gigatok_ds.evaluation.code_metrics import (
    codebook_usage,
    perplexity,
    unigram_entropy,
)
from gigatok_ds.evaluation.image_metrics import make_grid, psnr, ssim, to_uint8

PHOTOGRAPHS = ("astronaut", "chelsea", "coffee")  # that scikit-image ships


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs_have_scikit_images_figures(name):
    """One-image batches, through JPEG at low quality and a shift that leaves the range."""
    photograph = Image.fromarray(getattr(skimage.data, name)()).resize((200, 160))
    buffer = io.BytesIO()
    photograph.save(buffer, format="JPEG", quality=20)
    truth, restored = (scale_pixels(pixels_of(picture))[None] for picture in (photograph, Image.open(buffer)))
    restored = restored + 0.05
    unit = (truth[0].double() + 1).numpy().transpose(1, 2, 0) / 2
    theirs = to_uint8(restored)[0].numpy().transpose(1, 2, 0).astype(np.float64) / 255
    assert psnr(truth, restored).item() == pytest.approx(peak_signal_noise_ratio(unit, theirs, data_range=1.0),
                                                         rel=1e-6)
    expected = structural_similarity(unit, theirs, channel_axis=-1, data_range=2.0)
    assert ssim(truth, restored).item() == pytest.approx(expected, rel=1e-6)


def images(name, shape=(3, 3, 20, 24)):
    return torch.as_tensor(image(f"test_metrics/{name}", shape))


def test_every_pixel_value_survives_the_round_trip():
    values = torch.arange(256)
    assert torch.equal(to_uint8(values.float().div(255).sub(0.5).div(0.5)), values.to(torch.uint8))


def test_uint8_truncates_and_clamps():
    x = torch.tensor([-7.0, -1.0, -128 / 127.5 + 1e-4, 0.0, 0.5, (254.99 - 128) / 127.5, 1.0, 9.0])
    assert to_uint8(x).tolist() == [0, 0, 0, 128, 191, 254, 255, 255]
    assert to_uint8(x.bfloat16()).dtype == torch.uint8


def test_psnr_is_that_of_numpy():
    truth, noise = images("truth"), images("noise")
    restored = truth + torch.tensor([0.3, 0.02, 1.5])[:, None, None, None] * noise
    values = psnr(truth, restored)
    assert values.shape == (3,)
    for value, y, x in zip(values.tolist(), restored.numpy(), truth.numpy(), strict=True):
        pixels = np.trunc(np.clip(127.5 * y + np.float32(128), 0, 255)).astype(np.uint8)
        error = np.mean((pixels.astype(np.float64) / 255 - (x.astype(np.float64) + 1) / 2) ** 2)
        assert value == pytest.approx(10 * math.log10(1 / error), abs=1e-9)


def test_psnr_of_known_errors():
    black, white = -torch.ones(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
    assert psnr(black, white).item() == pytest.approx(0, abs=1e-12)
    assert psnr(black, black).item() == math.inf
    assert psnr(black, 25 * white).item() == pytest.approx(0, abs=1e-12), "images are clamped"
    one_level = black + 2 / 255
    assert psnr(black, one_level).item() == pytest.approx(20 * math.log10(255), abs=1e-9)


def test_ssim_is_that_of_scikit_image():
    truth, noise = images("truth"), images("noise")
    restored = truth + torch.tensor([0.3, 0.02, 1.5])[:, None, None, None] * noise
    values = ssim(truth, restored)
    assert values.shape == (3,) and values.dtype == torch.float64
    for value, y, x in zip(values.tolist(), to_uint8(restored).double() / 255, (truth.double() + 1) / 2, strict=True):
        expected = structural_similarity(y.numpy(), x.numpy(), channel_axis=0, data_range=2.0)
        assert value == pytest.approx(expected, abs=1e-9)


def test_ssim_of_known_images():
    black, white = -torch.ones(1, 3, 9, 8), torch.ones(1, 3, 9, 8)
    assert ssim(black, black).item() == pytest.approx(1, abs=1e-12)
    assert ssim(black, white).item() == pytest.approx(0.02**2 / (1 + 0.02**2), abs=1e-12)
    with pytest.raises(InputError, match=r"SSIM needs images of 7 x 7 pixels or more, not \(9, 6\)"):
        ssim(black[..., :6], white[..., :6])


def test_grids_place_images_by_row_and_column():
    tiles = torch.arange(2 * 3 * 3 * 4 * 5).remainder(251).to(torch.uint8).view(2, 3, 3, 4, 5)
    grid = make_grid(tiles, gap=2, background=255)
    assert grid.shape == (2 * 4 + 2, 3 * 5 + 2 * 2, 3) and grid.dtype == np.uint8
    for row in range(2):
        for column in range(3):
            top, left = row * 6, column * 7
            assert (grid[top : top + 4, left : left + 5] == tiles[row, column].permute(1, 2, 0).numpy()).all()
    assert (grid[4:6] == 255).all() and (grid[:, 5:7] == 255).all() and (grid[:, 12:14] == 255).all()
    floats = images("grid", (4, 3, 4, 4)).view(2, 2, 3, 4, 4)
    assert (make_grid(floats) == make_grid(to_uint8(floats))).all() and make_grid(floats).shape == (8, 8, 3)


def test_uniform_codes():
    codes = torch.arange(32).repeat(3).view(4, 24)
    assert codebook_usage(codes, 64) == 0.5
    assert unigram_entropy(codes, 64) == pytest.approx(math.log(32), abs=1e-12)
    assert perplexity(codes, 64) == pytest.approx(32, rel=1e-12)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.uint8])
def test_one_code_and_a_biased_coin(kind):
    same = torch.full((7,), 3, dtype=kind)
    assert perplexity(same, 4) == 1 and codebook_usage(same, 4) == 0.25
    coin = torch.tensor([0, 0, 0, 1], dtype=kind)
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert unigram_entropy(coin, 2) == pytest.approx(expected, abs=1e-12)
    assert perplexity(coin.numpy(), 1024) == pytest.approx(math.exp(expected), abs=1e-12)


@pytest.mark.parametrize("codes, message", [([], "no codes"),
                                            ([0, 4], "codes go from 0 to 4; a codebook of 4 allows 0 to 3"),
                                            ([-1, 2], "codes go from -1")])
@pytest.mark.parametrize("measure", [codebook_usage, unigram_entropy, perplexity])
def test_bad_codes_are_refused(measure, codes, message):
    with pytest.raises(InputError, match=message):
        measure(torch.tensor(codes, dtype=torch.int64), 4)


def test_classifier_reduces_large_images_and_repeats_itself():
    labels = np.arange(40) % 2
    stripes = torch.as_tensor(labels)[:, None, None, None] * torch.linspace(-1, 1, 40).view(1, 1, 1, 40)
    pictures = (stripes + 0.2 * images("stripes", (40, 3, 40, 40))).clamp(-1, 1)
    first, second = (ImageClassifier.fit(pictures[:30], labels[:30], 2) for _ in range(2))
    assert first.accuracy(pictures[30:], labels[30:]) == 1
    assert first.accuracy(pictures[30:].numpy(), 1 - torch.as_tensor(labels[30:])) == 0
    assert (first.predict(pictures) == second.predict(pictures)).all()


def test_classifier_of_a_single_class_and_bad_labels():
    pictures = images("single", (4, 3, 8, 8))
    assert ImageClassifier.fit(pictures, [2, 2, 2, 2], 3).predict(pictures[:2]).tolist() == [2, 2]
    with pytest.raises(InputError, match="labels go from 0 to 3; 3 classes allow 0 to 2"):
        ImageClassifier.fit(pictures, [0, 1, 2, 3], 3)
    with pytest.raises(InputError, match="got 3 labels for 4 images"):
        ImageClassifier.fit(pictures, [0, 1, 2], 3)
