"""Many images: the same whoever draws them and however often he is interrupted; settings are never mixed."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rank_runs import run_ranks
from saved_models import save_models
from small_models import small_gpt, small_tokenizer

from gigatok_ds.cli.main import main
from gigatok_ds.config.model import GPTConfig
from gigatok_ds.errors import InputError
from gigatok_ds.models.gpt import GPT
from gigatok_ds.parallel.topology import join_ranks
from gigatok_ds.sampling.batch_size import default_batch_size, fitting_batch_size
from gigatok_ds.sampling.many import SamplingJob, class_labels, draw_many, runs

SETTINGS = {"cfg_scale": 2.0, "cfg_schedule": "constant", "top_k": 0}
COUNT = 11


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"), gpt=small_gpt(), tokenizer=small_tokenizer())


def draw(models, out, *, batch_size=4, count=COUNT, balanced=False, seed=0, settings=SETTINGS):
    job = SamplingJob(gpt=models / "gpt", tokenizer=models / "tokenizer", settings=settings, seed=seed,
                      batch_size=batch_size)
    return draw_many(job, join_ranks("cpu", 1), out, count=count, balanced=balanced)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pngs(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "pngs"
    assert draw(models, out) == COUNT
    return out


@pytest.fixture(scope="module")
def npz(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("drawn") / "samples.npz"
    draw(models, out)
    return out


def test_pngs_and_npz_hold_the_same_images_and_say_what_they_are(pngs, npz, models):
    with np.load(npz, allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.dtype == np.uint8 and images.shape == (COUNT, 16, 16, 3)
    assert len(np.unique(images.reshape(COUNT, -1), axis=0)) == COUNT
    assert (labels == class_labels(COUNT, 5, seed=0, balanced=False)).all() and len(set(labels)) > 2
    for number, image in enumerate(images):
        assert (np.asarray(Image.open(pngs / f"{number:06d}.png")) == image).all()
    assert (np.load(pngs / "labels.npy") == labels).all()
    record = json.loads((pngs / "sampling.json").read_text())
    assert record == json.loads(npz.with_name("samples.npz.json").read_text())
    assert record["cfg_scale"] == 2.0 and record["seed"] == 0 and len(record["gpt"]["sha256"]) == 64
    assert record["gpt"]["name"] == "gpt" and str(models) not in json.dumps(record)
    assert [path.name for path in sorted(npz.parent.iterdir())] == ["samples.npz", "samples.npz.json"]


@pytest.mark.parametrize("ranks, batch_size", [(1, 1), (1, 7), (2, 2)])
def test_batches_and_ranks_do_not_matter(models, pngs, npz, tmp_path, ranks, batch_size):
    for out in (tmp_path / "pngs", tmp_path / "samples.npz"):
        if ranks == 1:
            draw(models, out, batch_size=batch_size)
        else:
            assert run_ranks(draw_on_a_rank, ranks, models, out, batch_size) == [COUNT] * ranks
    assert content(tmp_path / "pngs") == content(pngs)
    assert (tmp_path / "samples.npz").read_bytes() == npz.read_bytes()


def draw_on_a_rank(models, out, batch_size):
    return draw(models, out, batch_size=batch_size)


@pytest.mark.parametrize("size, dtype, gigabytes, images", [
    ("GPT-B", torch.bfloat16, 80, 512), ("GPT-XXL", torch.bfloat16, 80, 128), ("GPT-XXL", torch.float32, 80, 64),
    ("GPT-XXL", torch.float32, 24, 16), ("GPT-B", torch.float32, 8, 64), ("GPT-XXL", torch.float32, 2, 1)])
def test_a_gpu_draws_as_many_images_at_a_time_as_it_holds(size, dtype, gigabytes, images):
    with torch.device("meta"):
        gpt = GPT(GPTConfig(size=size)).to(dtype)
    assert fitting_batch_size(gpt, gigabytes * 10**9) == images
    assert default_batch_size(small_gpt()) == 32


def test_the_default_batch_draws_the_same_images(models, npz, tmp_path):
    draw(models, tmp_path / "samples.npz", batch_size=None)
    assert (tmp_path / "samples.npz").read_bytes() == npz.read_bytes()


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("name", ["pngs", "samples.npz"])
def test_what_is_there_is_kept_and_the_rest_is_drawn(models, pngs, npz, tmp_path, monkeypatch, name):
    from gigatok_ds.sampling import many

    out, decode = tmp_path / name, many.decode_images
    batches = iter([True, True, False])

    def twice(*arguments):
        if not next(batches):
            raise Interrupted
        return decode(*arguments)

    monkeypatch.setattr(many, "decode_images", twice)
    with pytest.raises(Interrupted):
        draw(models, out, batch_size=3)
    monkeypatch.undo()
    if name == "pngs":
        (out / "000002.png").unlink()
        before = (out / "000004.png").stat().st_mtime_ns
    assert draw(models, out, batch_size=4) == (COUNT - 5 if name == "pngs" else COUNT - 6)
    if name == "pngs":
        assert (out / "000004.png").stat().st_mtime_ns == before
        assert content(out) == content(pngs)
    else:
        assert out.read_bytes() == npz.read_bytes() and not out.with_name("samples.npz.parts").exists()
    assert draw(models, out) == 0


def test_settings_are_not_mixed(models, pngs, npz, tmp_path):
    for out in (pngs, npz):
        with pytest.raises(InputError, match=r"holds images with cfg_scale 2.0, not 3.0"):
            draw(models, out, settings=SETTINGS | {"cfg_scale": 3.0})
        with pytest.raises(InputError, match="with seed 0, not 1"):
            draw(models, out, seed=1)
    with pytest.raises(InputError, match="holds 11 images already, not 12"):
        draw(models, npz, count=12)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"exists already and has no sampling.json"):
        draw(models, tmp_path / "photos")
    with pytest.raises(InputError, match="unknown cfg_schedule"):
        draw(models, tmp_path / "new", settings={"cfg_schedule": "wave"})
    assert not (tmp_path / "new").exists()


def test_classes_and_pieces_of_the_work():
    assert class_labels(7, 3, seed=0, balanced=True).tolist() == [0, 1, 2, 0, 1, 2, 0]
    drawn = class_labels(3000, 3, seed=0, balanced=False)
    assert (np.bincount(drawn) > 900).all() and (class_labels(10, 3, seed=0, balanced=False) == drawn[:10]).all()
    assert list(runs([0, 1, 2, 5, 6, 7, 8, 11], 3)) == [range(3), range(5, 8), range(8, 9), range(11, 12)]
    assert list(runs([], 3)) == []


def test_the_command(models, tmp_path, capsys):
    sample = ["sample", "--gpt", str(models / "gpt"), "--tokenizer", str(models / "tokenizer"), "--out"]
    assert main([*sample, str(tmp_path / "b"), "--count", "6", "--balanced", "--cfg-interval", "3"]) == 0
    assert "6 images, 0 of which were there" in capsys.readouterr().out
    assert np.load(tmp_path / "b" / "labels.npy").tolist() == [0, 1, 2, 3, 4, 0]
    for more, words in ((["a.png", "--count", "2"], "ending in .npz"),
                        (["a", "--count", "2", "--per-class", "2"], "--per-class belongs to --classes"),
                        (["a.png", "--classes", "1", "--balanced"], "--balanced belongs to --count"),
                        (["a", "--count", "0"], "at least 1")):
        assert main([*sample, str(tmp_path / more[0]), *more[1:]]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a").exists() and not (tmp_path / "a.png").exists()
