"""`gigatok-ds evaluate` from files to results: on one rank and several, against plain computations, and what it
refuses.
"""

import json

import numpy as np
import pytest
import torch
from command_runs import figures, on_ranks, refused
from PIL import Image
from rank_runs import run_ranks
from saved_models import save_models
from small_models import small_gpt, small_tokenizer
from validation_data import validation_data

from gigatok_ds.data.transforms import scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.adm import gaussian_of, inception_score, precision_recall
from gigatok_ds.evaluation.code_metrics import codebook_usage, perplexity
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.distribution import Gaussian, frechet_distance
from gigatok_ds.evaluation.image_metrics import psnr, ssim
from gigatok_ds.evaluation.image_sets import FolderImages, NpzImages, open_images
from gigatok_ds.evaluation.inception import load_inception
from gigatok_ds.losses.perceptual import load_lpips

SAMPLES, REFERENCES, PHOTOS = 9, 5, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return validation_data(tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), tok=small_tokenizer(), gpt=small_gpt())


@pytest.fixture(scope="module")
def batches(tmp_path_factory):
    """samples.npz and reference.npz: random images of 16 pixels, the former with classes."""
    folder, rng = tmp_path_factory.mktemp("batches"), np.random.default_rng(0)
    pixels = rng.integers(0, 256, (SAMPLES, 16, 16, 3), dtype=np.uint8)
    np.savez(folder / "samples.npz", pixels, np.arange(SAMPLES) % 3)
    np.savez(folder / "reference.npz", rng.integers(60, 256, (REFERENCES, 16, 16, 3), dtype=np.uint8))
    return folder


def generation(batches, out, *more):
    return ["evaluate", "generation", batches / "samples.npz", "--reference", batches / "reference.npz", "--inception",
            "random", "--allow", "count", "--allow", "reference", "--cache", batches / "cache", "--batch-size", "2",
            "--out", out, *more]


def test_generated_images_have_the_figures_of_their_features(batches, tmp_path):
    run_ranks(on_ranks, 1, generation(batches, tmp_path / "one"))
    inception = load_inception("random", "here")
    sides = [inception.outputs(torch.as_tensor(np.load(batches / name)["arr_0"]).permute(0, 3, 1, 2))
             for name in ("reference.npz", "samples.npz")]
    pooled, spatial = ([gaussian_of(getattr(side, part)) for side in sides] for part in ("pooled", "spatial"))
    manifolds = precision_recall(sides[0].pooled, sides[1].pooled)
    assert figures(tmp_path / "one") == {
        "gfid_custom9_random": pytest.approx(frechet_distance(*pooled), rel=1e-6),
        "sfid_custom9_random": pytest.approx(frechet_distance(*spatial), rel=1e-6),
        "inception_score_9_random": pytest.approx(inception_score(sides[1].logits), rel=1e-6),
        "precision_custom9_random": manifolds.precision,
        "recall_custom9_random": manifolds.recall,
    }
    assert frechet_distance(*pooled) > 0.01
    kept = list((batches / "cache").iterdir())
    assert len(kept) == 1
    # Nine images in batches of two: the last is one image, and one rank of four has a batch more.
    run_ranks(on_ranks, 4, generation(batches, tmp_path / "four"))
    assert figures(tmp_path / "four") == pytest.approx(figures(tmp_path / "one"), rel=1e-6)
    assert list((batches / "cache").iterdir()) == kept, "computed once"
    settings = json.loads((tmp_path / "one" / "results.json").read_text())["settings"]
    assert (
        settings["reference_kind"] == "custom" and len(settings["samples_sha256"]) == 64 and "tf32_products" in settings
    )
    page = (tmp_path / "one" / "results.html").read_text()
    assert "gfid_custom9_random" in page and "data:image/png;base64" in page
    assert "| gfid_custom9_random |" in (tmp_path / "one" / "results.md").read_text()


@pytest.mark.slow
def test_statistics_in_the_reference_are_used_as_they_are(batches, tmp_path):
    inception = load_inception("random", "here")
    arrays = np.load(batches / "reference.npz")["arr_0"]
    output = inception.outputs(torch.as_tensor(np.load(batches / "samples.npz")["arr_0"]).permute(0, 3, 1, 2))
    statistics = {}
    for name, _part, width in (("", output.pooled, 2048), ("_s", output.spatial, 2023)):
        statistics |= {f"mu{name}": np.full(width, 0.25), f"sigma{name}": np.eye(width)}
    np.savez(tmp_path / "reference.npz", arrays, **statistics)
    arguments = generation(batches, tmp_path / "out")
    arguments[arguments.index("--reference") + 1] = tmp_path / "reference.npz"
    assert on_ranks(arguments) == 0
    given = Gaussian(torch.full((2048,), 0.25).double(), torch.eye(2048).double())
    expected = frechet_distance(gaussian_of(output.pooled), given)
    assert figures(tmp_path / "out")["gfid_custom9_random"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_a_set_against_itself(batches, tmp_path):
    arguments = generation(batches, tmp_path / "out")
    arguments[arguments.index("--reference") + 1] = batches / "samples.npz"
    assert on_ranks(arguments) == 0
    found = figures(tmp_path / "out")
    assert abs(found["gfid_custom9_random"]) < 1e-6 and abs(found["sfid_custom9_random"]) < 1e-6
    assert found["precision_custom9_random"] == found["recall_custom9_random"] == 1


def test_what_would_not_compare_is_refused(batches, tmp_path, capsys):
    plain = ["evaluate", "generation", batches / "samples.npz", "--reference", batches / "reference.npz", "--inception",
             "random", "--out", tmp_path / "out"]
    assert "holds 9 images, but published figures are of 50,000" in refused(capsys, *plain)
    assert "the reference is not ADM's batch" in refused(capsys, *plain, "--allow", "count")
    np.savez(tmp_path / "large.npz", np.zeros((5, 32, 32, 3), np.uint8))
    np.savez(tmp_path / "float.npz", np.zeros((5, 16, 16, 3), np.float32))
    np.savez(tmp_path / "flat.npz", np.zeros((5, 16), np.uint8))
    allowed = ["--reference", batches / "reference.npz", "--inception", "random", "--out", tmp_path / "out", "--allow",
               "count", "--allow", "reference"]
    start = ["evaluate", "generation"]
    assert "images of (32, 32) pixels, the reference of (16, 16)" in refused(capsys, *start, tmp_path / "large.npz",
                                                                             *allowed)
    assert "holds float32, but" in refused(capsys, *start, tmp_path / "float.npz", *allowed)
    assert "arr_0 should be (images, height, width, 3), not (5, 16)" in refused(capsys, *start, tmp_path / "flat.npz",
                                                                                *allowed)
    assert "does not exist" in refused(capsys, *start, tmp_path / "none.npz", *allowed)
    assert "needs --reference and --inception" in refused(capsys, *start, batches / "samples.npz", "--out",
                                                          tmp_path / "out")
    assert "--vgg does nothing" in refused(capsys, *plain, "--vgg", "random")
    assert "--allow size does nothing for evaluate reconstruction" in refused(
        capsys, "evaluate", "reconstruction", tmp_path, tmp_path, "--out", tmp_path, "--allow", "size")
    assert not (tmp_path / "out").exists()


def test_folders_and_files_hold_the_same(batches, tmp_path):
    full = NpzImages(batches / "samples.npz")
    for number in range(SAMPLES):
        Image.fromarray(full.read(range(number, number + 1))[0].permute(1, 2, 0).numpy()).save(
            tmp_path / f"{number:06d}.png")
    np.save(tmp_path / "labels.npy", full.labels)
    folder = open_images(tmp_path)
    assert isinstance(folder, FolderImages) and len(folder) == SAMPLES and folder.size == tuple(full.size)
    assert torch.equal(folder.read(range(3, SAMPLES)), full.read(range(3, SAMPLES)))
    assert folder.labels.tolist() == full.labels.tolist() == [number % 3 for number in range(SAMPLES)]
    np.savez_compressed(tmp_path / "packed.npz", full.read(range(SAMPLES)).permute(0, 2, 3, 1).numpy())
    assert torch.equal(open_images(tmp_path / "packed.npz").read(range(SAMPLES)), full.read(range(SAMPLES)))
    Image.new("RGB", (8, 8)).save(tmp_path / "000020.png")
    with pytest.raises(InputError, match=r"000020.png has \(8, 8\) pixels"):
        open_images(tmp_path).read(range(SAMPLES - 3, SAMPLES + 1))


def test_damaged_and_floating_batches(tmp_path, batches):
    content = (batches / "samples.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"is not an .npz batch"):
        open_images(tmp_path / "cut.npz")
    values = np.linspace(0, 255.9, 2 * 16 * 16 * 3).reshape(2, 16, 16, 3)
    np.savez(tmp_path / "float.npz", values)
    images = open_images(tmp_path / "float.npz", any_dtype=True)
    assert np.array_equal(images.read(range(2)).permute(0, 2, 3, 1), np.floor(values))
    np.savez(tmp_path / "unit.npz", values / 100 - 1)
    with pytest.raises(InputError, match=r"outside 0 .. 255"):
        open_images(tmp_path / "unit.npz", any_dtype=True).read(range(2))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number in range(PHOTOS):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


def test_reconstructions_have_the_figures_of_all_images(models, photos, tmp_path, data):
    vgg = data[0] / "vgg.pth"
    arguments = ["evaluate", "reconstruction", models / "tok", photos, "--inception", "random", "--vgg", vgg, "--allow",
                 "count", "--batch-size", "2", "--out"]
    for ranks in (1, 4):
        run_ranks(on_ranks, ranks, [*arguments, tmp_path / str(ranks)])
    tokenizer, images = small_tokenizer(), CroppedImages(photos, 16)
    real = scale_pixels(images.pixels(range(PHOTOS)))
    codes = tokenizer.encode(real)
    restored = tokenizer.decode(codes)
    inception = load_inception("random", "here")
    outputs = [inception.outputs(side) for side in (real, restored)]
    with torch.no_grad():
        lpips = load_lpips(vgg).eval()(real, restored)
    expected = {
        "psnr": psnr(real, restored).mean().item(), "ssim": ssim(real, restored).mean().item(),
        "lpips": lpips.double().mean().item(), "codebook_usage": codebook_usage(codes, 64),
        "codebook_perplexity": perplexity(codes, 64),
        "rfid_val5_random": frechet_distance(*(gaussian_of(side.pooled) for side in outputs)),
        "rsfid_val5_random": frechet_distance(*(gaussian_of(side.spatial) for side in outputs)),
    }
    assert figures(tmp_path / "1") == pytest.approx(expected, rel=1e-4)
    # Of three batches, the last of one image, one of four ranks has none.
    assert figures(tmp_path / "4") == pytest.approx(figures(tmp_path / "1"), rel=1e-6)
    page = (tmp_path / "1" / "results.html").read_text()
    assert "the best images above their reconstructions" in page
    assert Image.open(tmp_path / "1" / "picture-1.png").size == (PHOTOS * 18 - 2, 6 * 18 - 2)


def test_reconstruction_needs_the_validation_set(models, photos, tmp_path, capsys):
    start = ["evaluate", "reconstruction", models / "tok"]
    assert "holds 5 images, but published figures are of ImageNet's 50,000" in refused(capsys, *start, photos, "--out",
                                                                                       tmp_path / "o")
    assert "needs the data" in refused(capsys, *start, "--out", tmp_path / "o")


def test_loss_is_the_mean_over_codes(models, photos, tmp_path):
    arguments = ["evaluate", "loss", models / "gpt", photos, "--tokenizer", models / "tok", "--batch-size", "2",
                 "--out"]
    for ranks in (1, 2):
        run_ranks(on_ranks, ranks, [*arguments, tmp_path / str(ranks)])
    tokenizer, gpt, images = small_tokenizer(), small_gpt(), CroppedImages(photos, 16)
    codes = tokenizer.encode(scale_pixels(images.pixels(range(PHOTOS))))
    labels = torch.tensor([images[number]["labels"] for number in range(PHOTOS)])
    with torch.no_grad():
        logits = gpt(codes[:, :-1], labels).double()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), codes.flatten()).item()
    for ranks in ("1", "2"):
        assert figures(tmp_path / ranks) == {"validation_loss": pytest.approx(expected, rel=1e-6), "sequences": PHOTOS}


def test_loss_of_stored_codes_is_the_same(models, photos, tmp_path):
    assert on_ranks(["make-shards", photos, "--out", tmp_path / "shards"]) == 0
    assert on_ranks(["extract-codes", models / "tok", tmp_path / "shards", "--crops", "center", "--out",
                     tmp_path / "codes"]) == 0
    assert on_ranks(["evaluate", "loss", models / "gpt", tmp_path / "codes", "--out", tmp_path / "stored"]) == 0
    assert on_ranks(["evaluate", "loss", models / "gpt", tmp_path / "shards", "--tokenizer", models / "tok", "--out",
                     tmp_path / "images"]) == 0
    assert figures(tmp_path / "stored") == pytest.approx(figures(tmp_path / "images"), rel=1e-6)


def test_samples_that_lost_pixels_or_would_be_black_are_refused(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3),
                                     dtype=np.uint8)).save(tmp_path / f"{i}.{'jpg' if i == 1 else 'png'}")
    with pytest.raises(InputError, match=r"1.jpg is a JPEG.*--allow dtype"):
        open_images(tmp_path).read(range(3))
    for allowed in ({"any_dtype": True}, {"lossy": True}):
        assert open_images(tmp_path, **allowed).read(range(3)).shape == (3, 3, 16, 16)
    (tmp_path / "1.jpg").rename(tmp_path / "1.png")  # it is still one
    with pytest.raises(InputError, match=r"1.png is a JPEG"):
        open_images(tmp_path).read(range(3))
    np.savez(tmp_path / "one.npz", rng.random((5, 16, 16, 3)).astype(np.float32))
    with pytest.raises(InputError, match=r"floats in 0 .. 1, which would all be black; multiply them by 255"):
        open_images(tmp_path / "one.npz", any_dtype=True)
