"""Validation of a tokenizer: against plain computations over all images, on one rank and two; what it measures when."""

import numpy as np
import pytest
import torch
from feature_vectors import distance_of_few
from rank_runs import run_ranks
from validation_data import FEW_IMAGES, validation_data

from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe, save_resolved
from gigatok_ds.data.loader import evaluation_batches
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.code_metrics import codebook_usage, perplexity
from gigatok_ds.evaluation.image_metrics import psnr, to_uint8
from gigatok_ds.evaluation.inception import load_inception
from gigatok_ds.losses.perceptual import load_lpips
from gigatok_ds.models.tokenizer import TokenizerOutput
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.parallel.topology import start_process_group, stop_process_group
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.training import validation_pass
from gigatok_ds.training.run import run_training
from gigatok_ds.training.run_checks import check_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return validation_data(tmp_path_factory.mktemp("validation"))


@pytest.fixture(scope="module")
def recipe(data):
    folder, arguments = data

    def make(*overrides):
        return load_recipe(folder / "tokenizer.yaml", [*arguments, *overrides])

    return make


class StandIn(torch.nn.Module):
    """A tokenizer whose reconstructions are the same to the bit in any batch: a real one's rounding, which depends on
    that, tips a pixel to the next of 256 levels now and then. They leave [-1, 1]."""

    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def forward(self, pixels):
        codes = to_uint8(pixels)[:, 0, 0, :8].long() % 64
        missing = dict.fromkeys(TokenizerOutput._fields)
        return TokenizerOutput(**missing | {"reconstruction": 1.5 * pixels.flip(3),
                                            "codes": torch.where(codes == 0, -1, codes) if self.broken else codes})


def measure(recipe, vgg, batch_size, steps=(1,), network=None):
    """The figures that this rank finds at each of `steps`."""
    topology = start_process_group()
    perceptual = vgg and load_lpips(vgg, dropout=True)
    index = ShardIndex.open(recipe.data.validation)
    ours = validation_pass.TokenizerValidation(recipe, index, perceptual, topology, batch_size)
    figures = [ours.measure(network or StandIn(), step) for step in steps]
    assert perceptual is None or perceptual.training, "the loss keeps its dropout"
    stop_process_group(topology)
    return figures


def whole_set(recipe):
    """All validation images, their reconstructions, and their codes."""
    index = ShardIndex.open(recipe.data.validation)
    batch = next(iter(evaluation_batches(index, recipe.model.image_size, len(index))))
    assert batch["valid"].all()
    output = StandIn()(batch["images"])
    return batch["images"], output.reconstruction, output.codes


@pytest.fixture(scope="module")
def few(data, recipe):
    """Inception takes a third of a second for each image."""
    return recipe("validation.inception=random", f"data.validation={data[0] / 'few'}")


@pytest.fixture(scope="module")
def alone(data, few):
    return run_ranks(measure, 1, few, data[0] / "vgg.pth", 2)[0][0]


def test_figures_are_those_of_the_whole_set(data, few, alone):
    images, restored, codes = whole_set(few)
    assert restored.abs().max() > 1.2 and len(images) == FEW_IMAGES
    with torch.no_grad():
        lpips = load_lpips(data[0] / "vgg.pth").eval()(images, restored)
    inception = load_inception("random", "here")
    distance = distance_of_few(*(inception(side).double() for side in (images, restored)))
    assert distance > 0.1
    assert alone == {
        "psnr": pytest.approx(psnr(images, restored).mean().item(), rel=1e-6),
        "lpips": pytest.approx(lpips.double().mean().item(), rel=1e-6),
        "codebook_usage": codebook_usage(codes, 64),
        "codebook_perplexity": pytest.approx(perplexity(codes, 64), rel=1e-12),
        "rfid_val5_random": pytest.approx(distance, rel=1e-6),
    }


def test_two_ranks_find_what_one_does(data, few, alone):
    """Three rounds of 2 images on one rank are two on two, where the last rank finds padding only."""
    ours, theirs = run_ranks(measure, 2, few, data[0] / "vgg.pth", 2)
    assert ours == theirs
    assert ours[0] == pytest.approx(alone, rel=1e-6)


def test_images_of_a_subset_are_evenly_spaced(recipe):
    index = ShardIndex.open(recipe().data.validation)
    taken = [batch["sample"][batch["valid"]] for batch in evaluation_batches(index, 16, 2, images=5)]
    assert torch.cat(taken).tolist() == [0, 2, 4, 6, 8]
    images, restored, _ = whole_set(recipe())
    subset = run_ranks(measure, 2, recipe("validation.images=5"), None, 2)[1][0]
    assert subset["psnr"] == pytest.approx(psnr(images, restored)[[0, 2, 4, 6, 8]].mean().item(), rel=1e-6)
    assert set(subset) == {"psnr", "codebook_usage", "codebook_perplexity"}
    with pytest.raises(InputError, match=r"validation.images is 12, but .* holds 11; lower it"):
        measure(recipe("validation.images=12"), None, 2)


def test_rfid_comes_at_its_steps_and_images_are_looked_at_once(recipe, monkeypatch):
    seen = []
    monkeypatch.setattr(validation_pass, "load_inception", lambda *_: CountingFeatures(seen))
    monkeypatch.setattr(validation_pass, "FEATURES", 48)
    settings = ["validation.inception=random", "validation.fid_every=8", "validation.images=3", "training.steps=20"]
    figures = measure(recipe(*settings), None, 4, steps=(4, 8, 12, 16, 20))
    assert ["rfid_val3_random" in found for found in figures] == [False, True, False, True, True]
    assert len({found["rfid_val3_random"] for found in figures if "rfid_val3_random" in found}) == 1
    assert seen == [3, 3, 3, 3], "reconstructions each time, images the first time"


class CountingFeatures(torch.nn.Module):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def forward(self, images):
        self.seen.append(len(images))
        return images.mean(dim=2).flatten(1)


def test_latents_that_are_not_finite_are_told(recipe):
    without = (whole_set(recipe())[2] == 0).sum().item()
    with pytest.raises(InputError, match=f"^{without} latents of the validation images are not finite"):
        measure(recipe(), None, 4, network=StandIn(broken=True))
    assert without > 0


def test_an_rfid_is_named_by_its_images():
    names = [validation_pass.fid_name(count, "file.pth") for count in (50_000, 5000, 1234)]
    assert names == ["rfid_val50k", "rfid_val5k", "rfid_val1234"]
    assert validation_pass.fid_name(50_000, "random") == "rfid_val50k_random"


@pytest.mark.parametrize("overrides, message", [
    (["validation.fid_every=4"], "validation.fid_every is 4, but it does nothing without validation.inception"),
    (["validation.inception=x.pth", "validation.fid_every=6"], "must be a multiple of training.validate_every, .* 4"),
    (["validation.images=1"], "validation.images is 1; it must be at least 2"),
    (["validation.image=1"], "unknown key validation.image; did you mean images"),
    (["validation.inception=true"], "validation.inception is True"),
])
def test_wrong_settings_are_refused(recipe, overrides, message):
    with pytest.raises(InputError, match=message):
        recipe(*overrides)


def test_the_weights_are_looked_for_before_a_run_and_settings_may_change_in_it(recipe, tmp_path):
    with pytest.raises(InputError, match=r"validation.inception: there is no file nowhere.pth"):
        check_run(recipe("validation.inception=nowhere.pth"), tmp_path)
    save_resolved(recipe(), tmp_path / "recipe.yaml")
    check_run(recipe("validation.inception=random", "validation.images=7", "validation.perceptual=false"), tmp_path)


def test_a_run_logs_what_it_measures(data, recipe):
    out = data[0] / "run"
    overrides = ["training.steps=2", "training.validate_every=1", "validation.inception=random",
                 "validation.fid_every=2", "validation.images=2"]
    run_ranks(run_training, 2, recipe(*overrides), out, zero_settings(1))
    logged = [{name for name in line if name.startswith("validation/")} for line in read_metrics(out)]
    common = {"validation/psnr", "validation/codebook_usage", "validation/codebook_perplexity"}
    assert [names for names in logged if names] == [common, common | {"validation/rfid_val2_random"}]
    value = read_metrics(out)[-1]["validation/rfid_val2_random"]
    assert np.isfinite(value) and value > 0
