"""Code shards: what is written is read back, bad codes are refused, batches follow their addresses."""

import hashlib
import io
import json

import numpy as np
import pytest
import torch
from reading_plans import planned

from gigatok_ds.cluster.share import Share
from gigatok_ds.data.codes import CodeBatches, CodeDataset, CodeSample, code_dtype, write_code_shards
from gigatok_ds.errors import InputError
from gigatok_ds.shards.index import ShardIndex
from gigatok_ds.shards.tar_writer import new_directory, write_tars
from gigatok_ds.streams import numpy_stream

SHAPE = (3, 5)  # augmentations, latent tokens


def samples(count=23, codebook_size=1024, dtype=np.int64):
    rng = np.random.default_rng(0)
    for i in range(count):
        codes = rng.integers(0, codebook_size, SHAPE).astype(dtype)
        yield CodeSample(key=f"c{i:03d}", codes=codes, label=i % 7)


def write(directory, items=None, codebook_size=1024, samples_per_shard=10):
    return write_code_shards(samples() if items is None else items, directory, codebook_size=codebook_size,
                             latent_tokens=5, provenance={"tokenizer": "demo"},
                             samples_per_shard=samples_per_shard)


@pytest.fixture
def directory(tmp_path):
    return write(tmp_path / "codes").directory


@pytest.mark.parametrize("codebook_size, stored", [(2, "<u2"), (16384, "<u2"), (65536, "<u2"), (65537, "<i4"),
                                                   (2**20, "<i4")])
@pytest.mark.parametrize("given", [np.int64, np.int32])
def test_codes_come_back(tmp_path, codebook_size, stored, given):
    written = write(tmp_path / "codes", samples(23, codebook_size, given), codebook_size)
    assert [shard.samples for shard in written.shards] == [10, 10, 3] and written.count == 23
    data = CodeDataset.open(tmp_path / "codes")
    assert data.codes.dtype == np.dtype(stored) == code_dtype(codebook_size)
    assert data.codes.shape == (23, *SHAPE)
    for i, sample in enumerate(samples(23, codebook_size)):
        assert (data.codes[i] == sample.codes).all() and data.labels[i] == sample.label
    assert len(data) == 23
    assert data.metadata == {"format": "gigatok-ds-codes/1", "codebook_size": codebook_size,
                             "latent_tokens": 5, "augmentations": 3, "count": 23,
                             "provenance": {"tokenizer": "demo"}}


def test_other_programs_can_read_them(directory):
    index = ShardIndex.open(directory, ("npy",))
    first = np.load(io.BytesIO(index.read(0)), allow_pickle=False)
    assert first.dtype == np.uint16 and (first == next(samples()).codes).all()


def test_the_same_codes_give_the_same_bytes(tmp_path):
    first, second = ({path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                      for path in write(tmp_path / name).directory.iterdir()} for name in "ab")
    assert first == second and len(first) == 3 + 3


@pytest.mark.parametrize("change, message", [
    ({"codes": np.full(SHAPE, 1024)}, "'c004': codes go from 1024 to 1024; .* 1024 allows 0 to 1023"),
    ({"codes": np.full(SHAPE, -1)}, "'c004': codes go from -1"),
    ({"codes": np.zeros(SHAPE, np.float32)}, "'c004': codes are float32"),
    ({"codes": np.zeros((2, 5), int)}, r"'c004': codes have shape \(2, 5\); .* = \(3, 5\)"),
    ({"codes": np.zeros((3, 6), int)}, "'c004': codes have shape"),
    ({"codes": np.zeros(5, int)}, "'c004': codes have shape"),
    ({"label": -2}, "'c004' has label -2"),
    ({"key": "c001"}, "'c001' occurs twice"),
    ({"key": "../c"}, "sample key"),
])
def test_a_bad_sample_leaves_nothing_behind(tmp_path, change, message):
    items = [sample if i != 4 else CodeSample(**vars(sample) | change) for i, sample in enumerate(samples(8))]
    with pytest.raises(InputError, match=message):
        write(tmp_path / "codes", items, samples_per_shard=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("codes", [np.zeros(5, int), np.zeros((0, 5), int), np.zeros((3, 4), int)])
def test_a_bad_first_sample_is_refused(tmp_path, codes):
    with pytest.raises(InputError, match="codes have shape"):
        write(tmp_path / "codes", [CodeSample(key="a", codes=codes, label=0)])


def test_no_samples_and_a_directory_in_use_are_refused(tmp_path, directory):
    with pytest.raises(InputError, match="no samples"):
        write(tmp_path / "other", [])
    with pytest.raises(InputError, match="not empty"):
        write(directory)


def edit_metadata(directory, **change):
    file = directory / "metadata.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))


@pytest.mark.parametrize("change, message", [
    ({"codebook_size": 500}, "a codebook of 500 allows 0 to 499"),
    ({"codebook_size": 70000}, "not an array of int32"),
    ({"latent_tokens": 6}, r"'c000' is not an array of uint16 \(3, 6\)"),
    ({"augmentations": 1}, "'c000' is not an array"),
    ({"count": 22}, "holds 23 samples, its metadata.json says 22"),
    ({"count": "many"}, "count is 'many'"),
    ({"latent_tokens": 0}, "latent_tokens is 0"),
    ({"format": "other"}, "format 'other'"),
])
def test_metadata_that_disagrees_is_refused(directory, change, message):
    edit_metadata(directory, **change)
    with pytest.raises(InputError, match=message):
        CodeDataset.open(directory)


def test_missing_and_damaged_directories_are_refused(tmp_path, directory):
    with pytest.raises(InputError, match=r"no metadata.json"):
        CodeDataset.open(tmp_path)
    (directory / "metadata.json").write_text("{")
    with pytest.raises(InputError, match=r"metadata.json is damaged"):
        CodeDataset.open(directory)


def test_a_changed_shard_is_named(directory):
    tar = directory / "codes-000001.tar"
    data = bytearray(tar.read_bytes())
    data[ShardIndex.open(directory, ("npy",)).place(12)[1] + 130] ^= 4
    tar.write_bytes(data)
    with pytest.raises(InputError, match=r"'c012' in .*codes-000001.tar is damaged"):
        CodeDataset.open(directory)
    tar.write_bytes(data[:-512])
    with pytest.raises(InputError, match=r"codes-000001.tar has changed since it was indexed"):
        CodeDataset.open(directory)


def hand_made(directory, payload, label):
    with new_directory(directory) as scratch:
        write_tars([("a", {"npy": payload, "cls": label})], scratch, prefix="x", samples_per_shard=1,
                   extensions=("npy",), classes=[])
        metadata = {"format": "gigatok-ds-codes/1", "codebook_size": 10, "latent_tokens": 2,
                    "augmentations": 1, "count": 1}
        (scratch / "metadata.json").write_text(json.dumps(metadata))


def test_hand_made_shards_are_checked(tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, np.array([[1, 9]], np.uint16))
    good = buffer.getvalue()
    hand_made(tmp_path / "good", good, b"0")
    assert CodeDataset.open(tmp_path / "good").codes.tolist() == [[[1, 9]]]
    hand_made(tmp_path / "negative", good, b"-3")
    with pytest.raises(InputError, match="smallest label is -3"):
        CodeDataset.open(tmp_path / "negative")
    hand_made(tmp_path / "large", good[:-2] + b"\x0a\0", b"0")
    with pytest.raises(InputError, match="codes go from 1 to 10"):
        CodeDataset.open(tmp_path / "large")
    for name, payload in (("short", good[:-2]), ("signed", good.replace(b"<u2", b"<i2"))):
        hand_made(tmp_path / name, payload, b"0")
        with pytest.raises(InputError, match="not an array"):
            CodeDataset.open(tmp_path / name)


def test_labels_are_checked_against_the_model(directory):
    data = CodeDataset.open(directory)
    data.check_labels(7)
    with pytest.raises(InputError, match="'c006' has label 6"):
        data.check_labels(6)


def take(batches, number):
    iterator = iter(batches)
    read = [next(iterator) for _ in range(number)]
    return {name: torch.cat([batch[name] for batch in read]) for name in read[0]}, read


def code_batches(data, **arguments):
    return planned(CodeBatches, data, **{"global_batch_size": 8, "micro_batch_size": 8, "seed": 3} | arguments)


def test_batches_are_what_the_addresses_say(directory):
    data = CodeDataset.open(directory)
    read, _ = take(code_batches(data), 40)
    assert read["codes"].dtype == read["labels"].dtype == torch.int64 and read["codes"].shape == (320, 5)
    assert read["position"].tolist() == list(range(320))
    rows = set()
    for codes, label, epoch, sample in zip(*(read[name] for name in ("codes", "labels", "epoch", "sample")),
                                           strict=True):
        row = int(numpy_stream(3, "augmentation", int(epoch), int(sample)).integers(3))
        rows.add(row)
        assert codes.tolist() == data.codes[int(sample), row].tolist() and label == data.labels[int(sample)]
    assert rows == {0, 1, 2}


@pytest.mark.parametrize("ranks, micro", [(1, 2), (2, 4), (2, 1), (4, 2)])
def test_codes_do_not_depend_on_layout_workers_or_resuming(directory, ranks, micro):
    data = CodeDataset.open(directory)
    expected, _ = take(code_batches(data), 6)
    parts = [code_batches(data, micro_batch_size=micro, share=Share(rank=rank, size=ranks), start_step=2,
                          workers=1 if rank == ranks - 1 else 0) for rank in range(ranks)]
    streams = [take(part, 4 * part.micro_steps)[1] for part in parts]
    for name, reference in expected.items():
        together = torch.cat([batch[name] for group in zip(*streams, strict=True) for batch in group])
        assert torch.equal(together, reference[16:]), name
