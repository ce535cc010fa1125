"""Code extraction: each image and crop once, the same bytes whoever wrote them and however often they were killed."""

import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import rank_runs
import torch
from PIL import Image
from rank_runs import run_ranks
from small_models import small_tokenizer

from gigatok_ds.checkpoint.standalone import identify, known_codes, load_tokenizer, read_config, save_standalone
from gigatok_ds.cluster.launched import ALONE, LaunchedRank, launched_rank
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.data.transforms import center_crop, decode_image, pixels_of, scale_pixels, to_tensor
from gigatok_ds.errors import InputError
from gigatok_ds.models.quantizer import VectorQuantizer
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.packing import code_directory
from gigatok_ds.packing.shard_writer import Sample, write_shards
from gigatok_ds.parallel.rank_device import rank_device
from gigatok_ds.sampling.augmented_views import views_of
from gigatok_ds.sampling.extract import Extraction, extract_codes
from gigatok_ds.sampling.read_later import read_later
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.tar_writer import new_directory, write_tars

COUNT, PER_SHARD, BATCH = 11, 4, 5  # images; images in a shard of codes (3 shards); crops in a batch (2 images)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the ranks: another number may round differently."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def png(number, width=30):
    pixels = np.random.default_rng(number).integers(0, 256, (20 + number % 3, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png")
    return buffer.getvalue()


def sensitive_tokenizer():
    """One that gives each image other codes."""
    tokenizer, generator = small_tokenizer(), torch.Generator().manual_seed(1)
    for name, weight in tokenizer.named_parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=1.0 if name.startswith("quant_conv") else 0.4, generator=generator)
    return tokenizer


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder with a tokenizer and image shards of five images each."""
    folder = tmp_path_factory.mktemp("source")
    tokenizer = sensitive_tokenizer()
    save_standalone(folder / "tokenizer", tokenizer.config, tokenizer.state_dict(), provenance={"weights": "ema"})
    samples = (Sample(key=f"image{i:03d}", image_bytes=png(i), extension="png", label=i % 4) for i in range(COUNT))
    write_shards(samples, folder / "images", prefix="x", samples_per_shard=5, classes=list("abcd"))
    return folder


def extract(source, out, rank=ALONE, **changes):
    """What the command does, with two crops of each image."""
    arguments = dict(batch_size=BATCH, samples_per_shard=PER_SHARD, tokenizer="tokenizer", images="images",
                     crops="flip")
    arguments |= changes
    checkpoint, images, crops = (arguments.pop(name) for name in ("tokenizer", "images", "crops"))
    tokenizer = load_tokenizer(source / checkpoint)
    extract_codes(tokenizer, source / images, out, views=views_of(crops, tokenizer.config.image_size), rank=rank,
                  provenance={"tokenizer": identify(source / checkpoint)}, extraction=Extraction(**arguments))


def extract_as_launched(source, out, **changes):
    extract(source, out, rank=launched_rank(), **changes)


def contents(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """Every file of an extraction by one rank that nobody interrupted."""
    out = tmp_path_factory.mktemp("expected") / "codes"
    run_ranks(extract_as_launched, 1, source, out)
    return contents(out)


def test_codes_are_those_of_each_image_and_its_mirror_image(source, expected, tmp_path):
    for name, data in expected.items():
        (tmp_path / name).write_bytes(data)
    assert sorted(expected) == [*(f"codes-{k:06d}.tar" for k in range(3)), "index.json", "index.npz", "metadata.json"]
    data, images = CodeDataset.open(tmp_path), ShardIndex.open(source / "images")
    tokenizer, rows = load_tokenizer(source / "tokenizer"), []
    for i in range(COUNT):
        crop = center_crop(decode_image(images.read(i), "image"), 16)
        pixels = torch.stack([to_tensor(crop), to_tensor(crop).flip(-1)])
        rows.append(tokenizer.encode(pixels).numpy())
    # Other batches may round differently, and a latent halfway between two codes may go to the other one.
    assert (data.codes == np.stack(rows)).mean() > 0.99 and data.codes.shape == (COUNT, 2, 8)
    assert len({row.tobytes() for row in data.codes.reshape(-1, 8)}) == 2 * COUNT
    assert data.labels.tolist() == [i % 4 for i in range(COUNT)] and data.index.classes == list("abcd")
    assert [data.index.key(i) for i in range(COUNT)] == [f"image{i:03d}" for i in range(COUNT)]


def test_the_metadata_say_where_codes_come_from(source, expected):
    def sha256(file):
        return hashlib.sha256((source / file).read_bytes()).hexdigest()

    provenance = json.loads(expected["metadata.json"])["provenance"]
    assert provenance == {
        "tokenizer": {"name": "tokenizer", "provenance": {"weights": "ema", "codes_sha256": known_codes(
                          read_config(source / "tokenizer")["provenance"])},
                      "config_sha256": sha256("tokenizer/config.json"),
                      "weights_sha256": {"model.safetensors": sha256("tokenizer/model.safetensors")}},
        "crops": "flip", "image_size": 16, "shards": "images",
        "shards_sha256": ShardIndex.open(source / "images").identity(),
        "samples_per_shard": PER_SHARD, "batch_size": BATCH, "device": "cpu", "tf32": False, "orient": False,
    }


@pytest.mark.parametrize("tf32", [False, True])
def test_products_and_convolutions_round_alike(source, tmp_path, monkeypatch, tf32):
    def settings():
        return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

    seen, before, latent = set(), settings(), Tokenizer.latent
    monkeypatch.setattr(Tokenizer, "latent", lambda self, images: seen.add(settings()) or latent(self, images))
    extract(source, tmp_path / "codes", tf32=tf32)
    assert seen == {(tf32, tf32)} and settings() == before


def test_a_damaged_tokenizer_is_named(source, tmp_path, monkeypatch):
    latent = Tokenizer.latent
    monkeypatch.setattr(Tokenizer, "latent", lambda self, images: latent(self, images) / 0)
    with pytest.raises(InputError, match="latents of sample 'image000' hold nan or inf"):
        extract(source, tmp_path / "codes")
    monkeypatch.setattr(VectorQuantizer, "codebook", lambda self: self.embedding * torch.nan)
    with pytest.raises(InputError, match="codebook holds nan or inf"):
        extract(source, tmp_path / "more")


def test_results_are_read_in_their_order_once_the_next_one_is_started():
    started, read = [], []

    def results():
        for number in range(3):
            started.append(number)
            yield number, torch.tensor(number)

    for label, tensor in read_later(results()):
        read.append((label, int(tensor), len(started)))
    assert read == [(0, 0, 2), (1, 1, 3), (2, 2, 3)] and list(read_later([])) == []


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_changes_no_byte(source, expected, tmp_path, ranks):
    run_ranks(extract_as_launched, ranks, source, tmp_path / "codes")
    assert contents(tmp_path / "codes") == expected


def kill_at(event):
    """Let this process die at its event-th event: a batch, the moment before or after a file gets its name."""
    events = itertools.count(1)

    def count():
        if next(events) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    latent, replace = Tokenizer.latent, os.replace

    def latent_or_die(self, images):
        count()
        return latent(self, images)

    def replace_or_die(*arguments):
        count()
        replace(*arguments)
        count()

    Tokenizer.latent, os.replace = latent_or_die, replace_or_die


def is_killed(event, world_size, source, out):
    """Whether a copy of this process dies at an event before it has done all ranks' shares, the first rank's last."""
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException):
            kill_at(event)
            for rank in reversed(range(world_size)):
                extract(source, out, LaunchedRank(rank=rank, world_size=world_size))
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(process, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def kill_everywhere(source, expected, folder):
    """How many places there are to be killed at, each of which ends well."""
    extract(source, folder / "warm")
    for event in itertools.count(1):
        out = folder / f"codes{event}"
        if not is_killed(event, 1, source, out):
            return event - 1
        if (out / "metadata.partial.json").exists():
            with pytest.raises(InputError, match="incomplete"):
                CodeDataset.open(out)
        extract(source, out)
        assert contents(out) == expected, event
    return None


def kill_at_random(source, expected, folder):
    """How often several extractions were killed, with another number of ranks each time, until they ended well."""
    kills = []
    for seed in range(4):
        rng, out = np.random.default_rng(seed), folder / f"codes{seed}"
        kills.append(0)
        while is_killed(int(rng.integers(1, 11)), int(rng.integers(1, 5)), source, out):
            kills[-1] += 1
            assert kills[-1] < 60
        assert contents(out) == expected, seed
    return kills


def test_every_place_to_be_killed_at(source, expected, tmp_path):
    # 2 at the claim, 6 batches, 2 at each of 3 shards, of 2 files of the index, and at the metadata.
    assert run_ranks(kill_everywhere, 1, source, expected, tmp_path) == [2 + 6 + 6 + 4 + 2]


def test_killed_again_and_again_it_ends_with_the_same_bytes(source, expected, tmp_path):
    (kills,) = run_ranks(kill_at_random, 1, source, expected, tmp_path)
    assert min(kills) >= 1 and sum(kills) >= 8


def extract_slowly(source, out):
    torch.set_num_threads(1)
    # Else the data workers come from another such server, which would do all the imports again.
    multiprocessing.set_start_method("fork", force=True)
    latent = Tokenizer.latent
    Tokenizer.latent = lambda self, images: (time.sleep(0.1), latent(self, images))[1]
    extract(source, out, workers=2)


def test_killed_from_outside_while_workers_read(source, expected, tmp_path):
    out = tmp_path / "codes"
    for shards in (1, 2, None):  # killed when so many are there
        process = rank_runs._context.Process(target=extract_slowly, args=(source, out))
        process.start()
        try:
            deadline = time.monotonic() + 120
            while process.is_alive() and (shards is None or len(list(out.glob("codes-*.tar"))) < shards):
                assert time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            process.kill()
            process.join()
        assert process.exitcode == (0 if shards is None else -signal.SIGKILL)
        assert shards is None or not (out / "metadata.json").exists()
    assert contents(out) == expected


def interrupted(source, out, full=2):
    """An extraction that ended after `whole` shards."""
    with contextlib.suppress(InterruptedError), pytest.MonkeyPatch.context() as patch:
        batches, latent = itertools.count(), Tokenizer.latent

        def interrupt(self, images):
            if next(batches) == 2 * full + 1:
                raise InterruptedError
            return latent(self, images)

        patch.setattr(Tokenizer, "latent", interrupt)
        extract(source, out)
    assert sum(name.endswith(".tar") for name in contents(out)) == full
    return out


def test_whole_shards_are_kept_and_damaged_ones_written_again(source, expected, tmp_path, caplog):
    out = interrupted(source, tmp_path / "codes")
    (out / ".codes-000002.tar.abcdef").write_bytes(b"half a shard")
    (out / ".index.npz.abcdef").write_bytes(b"half an index")
    (out / "codes-000001.tar").write_bytes(expected["codes-000001.tar"][:3000])
    (out / "codes-000002.tar").write_bytes(expected["codes-000000.tar"])
    kept = (out / "codes-000000.tar").stat().st_mtime_ns, (out / "codes-000000.tar").stat().st_ino
    extract(source, out)
    assert contents(out) == expected
    assert kept == ((out / "codes-000000.tar").stat().st_mtime_ns, (out / "codes-000000.tar").stat().st_ino)
    assert sorted(record.message.count("written again") for record in caplog.records) == [1, 1]


def test_a_complete_extraction_is_left_alone(source, tmp_path, monkeypatch):
    extract(source, tmp_path / "codes")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}
    monkeypatch.setattr(Tokenizer, "latent", None)
    extract(source, tmp_path / "codes")
    assert before == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "codes").iterdir()}


@pytest.fixture(scope="module")
def others(source):
    """Beside the tokenizer and the images: another of each."""
    other = sensitive_tokenizer()
    other.quant_conv.weight.data += 0.01
    save_standalone(source / "other", other.config, other.state_dict(), provenance={"weights": "ema"})
    large = small_tokenizer(image_size=32)
    save_standalone(source / "large", large.config, large.state_dict())
    samples = (Sample(key=f"image{i:03d}", image_bytes=png(i), extension="png", label=i % 2) for i in range(COUNT))
    write_shards(samples, source / "relabelled", prefix="x", samples_per_shard=5, classes=list("abcd"))


@pytest.fixture(scope="module", params=["complete", "interrupted"])
def begun(request, source, tmp_path_factory):
    out = tmp_path_factory.mktemp(request.param) / "codes"
    extract(source, out) if request.param == "complete" else interrupted(source, out)
    return out


@pytest.mark.parametrize("change, message", [
    ({"tokenizer": "other"}, "begun with provenance.tokenizer.name 'tokenizer', now it is 'other'"),
    ({"tokenizer": "large"}, "provenance.tokenizer.name"),
    ({"images": "relabelled"}, "provenance.shards 'images', now it is 'relabelled'"),
    ({"crops": "random-2"}, "provenance.crops 'flip', now it is 'random-2'"),
    ({"crops": "ten-crop"}, "augmentations 2, now it is 10"),
    ({"batch_size": 4}, "batch_size 5, now it is 4"),
    ({"samples_per_shard": 5}, "samples_per_shard 4, now it is 5"),
])
def test_other_settings_are_refused(source, others, begun, change, message):
    before = contents(begun)
    with pytest.raises(InputError, match=message):
        extract(source, begun, **change)
    assert contents(begun) == before


def test_other_contents_under_the_same_names_are_refused(source, others, tmp_path):
    out, moved = interrupted(source, tmp_path / "codes"), tmp_path / "moved"
    for before, now in (("other", "tokenizer"), ("images", "images"), ("tokenizer", "kept"), ("relabelled", "labels")):
        shutil.copytree(source / before, moved / now)
    with pytest.raises(InputError, match=r"provenance.tokenizer.provenance.codes_sha256 '"):
        extract(moved, out)
    os.rename(moved / "tokenizer", moved / "other")
    os.rename(moved / "kept", moved / "tokenizer")
    os.rename(moved / "images", moved / "before")
    os.rename(moved / "labels", moved / "images")
    with pytest.raises(InputError, match=r"provenance.shards_sha256 '"):
        extract(moved, out)


def test_a_directory_of_something_else_is_refused(source, tmp_path):
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        extract(source, tmp_path)
    (tmp_path / "precious").rename(tmp_path / "metadata.partial.json")
    with pytest.raises(InputError, match=r"metadata.partial.json is damaged"):
        extract(source, tmp_path)
    with pytest.raises(InputError, match="it must be at least 1"):
        extract(source, tmp_path / "codes", samples_per_shard=0)
    with pytest.raises(InputError, match="batch size is 0"):
        extract(source, tmp_path / "codes", batch_size=0)
    assert not (tmp_path / "codes").exists()


def test_the_first_rank_does_not_wait_for_ever(messages, source, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(code_directory, "PATIENCE", 0.2)
    with pytest.raises(InputError, match=r"lacks 1 shards, codes-000001.tar first"):
        extract(source, tmp_path / "codes", LaunchedRank(rank=0, world_size=2))
    extract(source, tmp_path / "codes", LaunchedRank(rank=1, world_size=2))
    assert "metadata.json" not in contents(tmp_path / "codes")
    assert "rank 1 of 2: codes-000001.tar written, 4 of 4 images" in capsys.readouterr().err
    extract(source, tmp_path / "codes")
    assert contents(tmp_path / "codes") == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_an_undecodable_image_is_named_and_what_is_whole_stays(source, tmp_path, workers):
    records = [(f"image{i:03d}", {"png": png(i)[: None if i != 9 else 60], "cls": b"0"}) for i in range(COUNT)]
    with new_directory(tmp_path / "images") as scratch:
        write_tars(records, scratch, prefix="x", samples_per_shard=50, extensions=("png",), classes=[])
    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer")
    with pytest.raises(InputError, match=r"sample 'image009' of .*images/x-000000.tar: cannot decode"):
        extract(tmp_path, tmp_path / "codes", workers=workers)
    assert sorted(contents(tmp_path / "codes")) == ["codes-000000.tar", "codes-000001.tar", "metadata.partial.json"]


def test_ten_crops_are_those_of_torchvision():
    transforms = pytest.importorskip("torchvision.transforms")
    pixels = np.random.default_rng(0).integers(0, 256, (610, 700, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    views = views_of("ten-crop", 256)
    ours = scale_pixels(torch.stack([pixels_of(view) for view in views(image, 0)]))
    # The original: halve by boxes, bicubic to a short side of int(256 * 1.1), the middle square, TenCrop, [-1, 1].
    resized = image.resize((350, 305), Image.Resampling.BOX).resize((322, 281), Image.Resampling.BICUBIC)
    crops = transforms.TenCrop(256)(resized.crop((20, 0, 20 + 281, 281)))
    to_input = transforms.Compose([transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    theirs = torch.stack([to_input(crop) for crop in crops])
    assert views.count == 10 and ours.shape == (10, 3, 256, 256) and torch.equal(ours, theirs)
    assert len({view.numpy().tobytes() for view in ours}) == 10


def test_random_views_belong_to_the_image_and_its_number():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    views = views_of("random-4", 32, crop_scale=(0.6, 0.9), seed=3)
    first, again, other = ([view.tobytes() for view in views(image, number)] for number in (7, 7, 8))
    assert first == again and first[0] == other[0] == center_crop(image, 32).tobytes()
    assert len({*first, *other}) == 7 and views.count == len(first) == 4
    assert views.describe() == {"crops": "random-4", "image_size": 32, "orient": False, "crop_scale": [0.6, 0.9],
                                "crop_seed": 3}


@pytest.mark.parametrize("kind", ["", "twelve", "random", "random-0", "random--1", "ten", "center-2"])
def test_unknown_crops_are_refused(kind):
    with pytest.raises(InputError, match="unknown crops"):
        views_of(kind, 16)


def test_each_rank_has_a_device_of_its_own(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    rank = LaunchedRank(rank=5, world_size=8, local_rank=1)
    assert [str(rank_device(rank, name)) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:1", "cuda:0", "cpu"]
    assert taken == [torch.device("cuda", 1), torch.device("cuda", 0)]
    with pytest.raises(InputError, match="rank 6 would use GPU 2 of its host and sees 2"):
        rank_device(LaunchedRank(rank=6, world_size=8, local_rank=2), "cuda")
    for name in ("gpu", "mps"):
        with pytest.raises(InputError, match=f"device '{name}' is not known"):
            rank_device(rank, name)
