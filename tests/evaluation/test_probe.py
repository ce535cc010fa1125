"""Linear probes: the optimizer and schedule by their formulas, features where the original takes them, any number of
ranks, interrupted and continued, and (marked in the demo's report) accuracy on real images."""

import json
import math

import numpy as np
import pytest
import torch
from command_runs import figures, on_ranks, refused
from PIL import Image
from probe_world import probe_world
from rank_runs import run_ranks
from safetensors.torch import load_file
from small_models import small_gpt, small_gpt_config, small_tokenizer

from gigatok_ds.demo.digits import CLASSES, digits_splits
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.probing import linear_probe
from gigatok_ds.evaluation.probing.features import GPTFeatures, TokenizerFeatures
from gigatok_ds.evaluation.probing.lars import LARS
from gigatok_ds.evaluation.probing.linear_probe import Probe, ProbeSettings
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.packing.shard_writer import Sample, write_shards

SETTINGS = ProbeSettings(classes=5, epochs=90, warmup_epochs=10, batch_size=512)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return probe_world(tmp_path_factory.mktemp("probe"))


def command(world, out, *more):
    return ["probe", world / "tok", "--train", world / "train", "--val", world / "val", "--epochs", "6",
            "--warmup-epochs", "2", "--batch-size", "8", "--no-flip", "--out", out, *more]


def test_lars_by_its_formula():
    rng = np.random.default_rng(0)
    weight, bias, zero = rng.normal(size=(3, 4)), rng.normal(size=3), np.zeros((2, 2))
    parameters = [torch.nn.Parameter(torch.as_tensor(value.copy())) for value in (weight, bias, zero)]
    optimizer = LARS(parameters, lr=0.5)
    expected, velocities = [weight.copy(), bias.copy(), zero.copy()], [0.0, 0.0, 0.0]
    for _ in range(3):
        gradients = [rng.normal(size=value.shape) for value in expected]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = torch.as_tensor(gradient)
        optimizer.step()
        for i, gradient in enumerate(gradients):
            norms = np.linalg.norm(expected[i]), np.linalg.norm(gradient)
            scale = 0.001 * norms[0] / norms[1] if gradient.ndim > 1 and all(norms) else 1.0
            velocities[i] = 0.9 * velocities[i] + scale * gradient
            expected[i] = expected[i] - 0.5 * velocities[i]
    for parameter, value in zip(parameters, expected, strict=True):
        np.testing.assert_allclose(parameter.detach(), value, rtol=1e-12)


def test_schedule_by_its_formula():
    assert SETTINGS.lr(0) == 0 and SETTINGS.lr(5) == pytest.approx(0.1) and SETTINGS.lr(10) == pytest.approx(0.2)
    assert SETTINGS.lr(50) == pytest.approx(0.1) and SETTINGS.lr(90) == pytest.approx(0, abs=1e-12)
    assert SETTINGS.lr(33.25) == pytest.approx(0.2 * 0.5 * (1 + math.cos(math.pi * 23.25 / 80)))


def test_probe_layers_are_the_originals():
    layers = Probe(64, SETTINGS)
    norm, linear = layers
    assert (norm.eps, norm.momentum, norm.affine) == (1e-6, 0.1, False)
    assert linear.weight.std().item() == pytest.approx(0.01, rel=0.2) and linear.bias.abs().max() <= 1 / 8


def test_gpt_features_are_the_mean_of_the_middle_block_without_a_class():
    tokenizer, gpt = small_tokenizer(), small_gpt()
    images = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    seen = []
    hook = gpt.layers[0].register_forward_hook(lambda _m, _i, output: seen.append(output))
    codes = tokenizer.encode(images)
    with torch.no_grad():
        gpt(codes[:, :-1], torch.full((3,), 5))
    hook.remove()
    assert len(gpt.layers) == 2 and seen[0].shape == (8, 3, 32), "the class's position is one of eight"
    found = GPTFeatures(tokenizer, gpt)(images)
    torch.testing.assert_close(found, seen[0].mean(dim=0), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(GPTFeatures(tokenizer, gpt, depth=2)(images), found)
    with pytest.raises(InputError, match="depth is 3; this GPT has blocks 1 to 2"):
        GPTFeatures(tokenizer, gpt, depth=3)


def test_dropout_is_active_in_training_only_and_depends_on_the_sample():
    tokenizer, gpt = small_tokenizer(), initialise_(GPT(small_gpt_config(token_dropout=0.3)), seed=0)
    images = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)).expand(3, -1, -1, -1) * 2 - 1
    features = GPTFeatures(tokenizer, gpt)
    plain = features(images)
    assert torch.equal(plain[0], plain[1]) and not gpt.training
    dropped = features(images, torch.tensor([5, 6, 5]))
    assert torch.equal(dropped[0], dropped[2]) and not torch.allclose(dropped[0], dropped[1])
    torch.testing.assert_close(features(images[:1], torch.tensor([6]))[0], dropped[1])  # whatever the batch
    without = GPTFeatures(tokenizer, gpt, dropout=False)
    assert torch.allclose(without(images, torch.tensor([5, 6, 5])), plain)


@pytest.mark.parametrize("layout", ["1d", "2d"])
def test_tokenizer_features(layout):
    changes = {} if layout == "1d" else {"layout": "2d", "latent_tokens": 64}
    tokenizer = small_tokenizer(**changes)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        encoded = tokenizer.encoder(tokenizer.cnn_encoder(images))
        latent = tokenizer.quantizer.lookup(tokenizer.encode(images))
        semantic = tokenizer.decoder(tokenizer.post_quant_conv(latent), semantic=True)[1]
    torch.testing.assert_close(TokenizerFeatures(tokenizer, "cnn")(images), encoded.flatten(2).mean(2), rtol=1e-5,
                               atol=1e-6)
    for place, width in (("encoder", 32), ("decoder", 32)):
        found = TokenizerFeatures(tokenizer, place)(images)
        assert found.shape == (2, width) and TokenizerFeatures(tokenizer, place).width == width
    # The semantic head is what comes after the decoder's features; it is not linear, so it must differ for single
    # tokens.
    tokens = []
    hook = tokenizer.decoder.transformer[0].register_forward_hook(lambda _m, _i, output: tokens.append(output))
    with torch.no_grad():
        tokenizer.decode(tokenizer.encode(images))
    hook.remove()
    torch.testing.assert_close(TokenizerFeatures(tokenizer, "decoder")(images), tokens[0].mean(dim=0))
    with torch.no_grad():
        torch.testing.assert_close(tokenizer.decoder.distill_mlp(tokens[0]).transpose(0, 1), semantic)


def test_ranks_do_not_matter_with_dropout_neither(world, tmp_path):
    for ranks in (1, 2, 4):
        run_ranks(on_ranks, ranks, command(world, tmp_path / str(ranks), "--gpt", world / "gpt"))
    one, two, four = (load_file(tmp_path / name / "probe.safetensors") for name in ("1", "2", "4"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(four[name], value, rtol=1e-5, atol=1e-6)
    assert figures(tmp_path / "1") == figures(tmp_path / "2") == figures(tmp_path / "4")
    assert one["1.weight"].abs().max() > 0.02 and one["0.running_var"].min() >= 0


def stop_after(steps, arguments, monkeypatch):
    """A run that dies after so many optimizer steps."""
    taken, plain = [], LARS.step

    def step(self):
        plain(self)
        taken.append(1)
        if len(taken) == steps:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LARS, "step", step)
        assert on_ranks(arguments) == 130


def test_an_interrupted_probe_goes_on_and_ends_bitwise_the_same(world, tmp_path, monkeypatch, capsys):
    on_ranks(command(world, tmp_path / "whole"))
    monkeypatch.setattr(linear_probe.ProbeRun.run, "__kwdefaults__", {"save_every": 2})
    stop_after(13, command(world, tmp_path / "parts"), monkeypatch)
    state = tmp_path / "parts" / "probe.safetensors"
    assert state.is_file() and not (tmp_path / "parts" / "results.json").exists()
    assert "is the state of another probe" in refused(capsys, *command(world, tmp_path / "parts", "--seed", "1"))
    assert on_ranks(command(world, tmp_path / "parts")) == 0
    full, parts = load_file(tmp_path / "whole" / "probe.safetensors"), load_file(state)
    assert full.keys() == parts.keys() and all(torch.equal(full[name], parts[name]) for name in full)
    assert figures(tmp_path / "whole") == figures(tmp_path / "parts")


def test_a_damaged_state_and_wrong_settings_are_told(world, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "probe.safetensors").write_bytes(b"x" * 100)
    assert "is damaged" in refused(capsys, *command(world, tmp_path / "out"))
    assert "--depth and --no-dropout belong to --gpt" in refused(capsys,
                                                                 *command(world, tmp_path / "o", "--depth", "1"))
    assert "the batch size is 64, but there are 40" in refused(capsys,
                                                               *command(world, tmp_path / "o", "--batch-size", "64"))
    assert "epochs are 1, warm-up epochs 2" in refused(capsys, *command(world, tmp_path / "o", "--epochs", "1"))
    assert not (tmp_path / "o").exists()


class Pixels:
    """The image itself as its feature: a probe on it is linear classification of pixels."""

    width = 3 * 16 * 16

    class tokenizer:
        class config:
            image_size = 16

    def __call__(self, images, positions=None):
        return images.flatten(1)

    def describe(self):
        return {"features": "pixels"}


def test_a_probe_on_pixels_learns_real_digits(tmp_path):
    """All 1,797 digits: what a linear classifier reaches is known, about 96%; crops cost a little."""
    from gigatok_ds.evaluation.cropped import CroppedImages
    from gigatok_ds.parallel.topology import single_process
    from gigatok_ds.shards.index import ShardIndex

    for name, samples in zip(("train", "val"), digits_splits(16), strict=True):
        write_shards(iter(samples), tmp_path / name, prefix=name, classes=CLASSES)
    settings = ProbeSettings(classes=10, epochs=7, warmup_epochs=1, base_lr=40.0, batch_size=128, flip=False)
    run = linear_probe.ProbeRun(Pixels(), ShardIndex.open(tmp_path / "train"), settings, single_process(),
                                tmp_path / "out",
                         identity={})
    assert run.run() < 1
    assert run.accuracy(CroppedImages(tmp_path / "val", 16), 64) > 0.9


def test_labels_beyond_the_classes_are_refused(tmp_path):
    from gigatok_ds.parallel.topology import single_process
    from gigatok_ds.shards.index import ShardIndex

    def sample(number):
        path = tmp_path / "image.png"
        Image.new("RGB", (16, 16)).save(path)
        return Sample(key=str(number), image_bytes=path.read_bytes(), extension="png", label=number)

    write_shards((sample(number) for number in range(4)), tmp_path / "s", prefix="s",
                 classes=[str(n) for n in range(4)])
    with pytest.raises(InputError):
        linear_probe.ProbeRun(Pixels(), ShardIndex.open(tmp_path / "s"), ProbeSettings(classes=3, batch_size=2),
                              single_process(),
                       tmp_path / "out", identity={})


def test_results_say_what_was_probed(world, tmp_path):
    on_ranks(command(world, tmp_path / "out", "--gpt", world / "gpt", "--no-dropout"))
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(found["figures"]) == {"probe_top1_percent"} and 0 <= found["figures"]["probe_top1_percent"] <= 100
    assert (
        found["settings"]["block"] == 1 and found["settings"]["dropout"] is False and found["settings"]["epochs"] == 6
    )
