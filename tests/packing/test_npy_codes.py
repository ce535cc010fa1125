"""The original's folders of .npy codes become code shards, or are refused with a reason."""

import numpy as np
import pytest

from gigatok_ds.cli.main import main
from gigatok_ds.cluster.launched import LaunchedRank
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.errors import InputError
from gigatok_ds.packing.npy_codes import convert_npy_codes

COUNT = 13


def codes(i):
    return np.random.default_rng(i).integers(0, 100, (10, 6))


@pytest.fixture
def original(tmp_path):
    """As the original writes them: {dataset}{image_size}_codes and _labels."""
    for name in ("codes", "labels"):
        (tmp_path / "ten_crop" / f"imagenet256_{name}").mkdir(parents=True)
    for i in range(COUNT):
        np.save(tmp_path / "ten_crop" / "imagenet256_codes" / f"{i}.npy", codes(i))
        np.save(tmp_path / "ten_crop" / "imagenet256_labels" / f"{i}.npy", np.array(i % 5))
    return tmp_path / "ten_crop"


def test_the_folder_or_its_parent_becomes_code_shards(original, tmp_path):
    for name, folder in (("a", original), ("b", original / "imagenet256_codes")):
        arguments = ["--from-npy", folder, "--codebook-size", 100, "--samples-per-shard", 5, "--out", tmp_path / name]
        assert main(["extract-codes", *map(str, arguments)]) == 0
    data = CodeDataset.open(tmp_path / "a")
    assert data.codes.dtype == np.uint16 and data.codes.tolist() == [codes(i).tolist() for i in range(COUNT)]
    assert data.labels.tolist() == [i % 5 for i in range(COUNT)] and data.index.key(12) == "00000012"
    assert [shard.samples for shard in data.index.shards] == [5, 5, 3]
    assert data.metadata["provenance"] == {"npy_codes": "imagenet256_codes", "samples_per_shard": 5}
    assert all(path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() for path in (tmp_path / "a").iterdir())


def test_interrupted_it_goes_on_and_ranks_share_the_work(original, tmp_path):
    damaged = original / "imagenet256_codes" / "7.npy"
    full = damaged.read_bytes()
    damaged.write_bytes(full[:200])
    arguments = dict(codebook_size=100, samples_per_shard=5)
    with pytest.raises(InputError, match=r"7.npy is not a plain .npy array"):
        convert_npy_codes(original, tmp_path / "out", **arguments)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["codes-000000.tar", "metadata.partial.json"]
    damaged.write_bytes(full)
    with pytest.raises(InputError, match="begun with codebook_size 100, now it is 200"):
        convert_npy_codes(original, tmp_path / "out", codebook_size=200, samples_per_shard=5)
    for rank in (1, 0):
        convert_npy_codes(original, tmp_path / "out", rank=LaunchedRank(rank=rank, world_size=2), **arguments)
    assert (CodeDataset.open(tmp_path / "out").codes == np.stack([codes(i) for i in range(COUNT)])).all()


def remove(name, number):
    return lambda root: (root / f"imagenet256_{name}" / f"{number}.npy").unlink()


def replace(name, number, array, pickled=False):
    return lambda root: np.save(root / f"imagenet256_{name}" / f"{number}.npy", array, allow_pickle=pickled)


@pytest.mark.parametrize("damage, message", [
    (remove("codes", 4), "holds 12 .npy files, but not 4.npy"),
    (remove("labels", 12), "holds 13 files, .*imagenet256_labels 12"),
    (replace("codes", 3, np.full((10, 6), 100)), "'00000003': codes go from 100 to 100; a codebook of 100"),
    (replace("codes", 3, np.zeros((2, 6), int)), r"'00000003': codes have shape \(2, 6\)"),
    (replace("codes", 0, np.zeros(6, int)), r"0.npy has shape \(6,\)"),
    (replace("codes", 2, np.zeros((10, 6))), "'00000002': codes are float64"),
    (replace("codes", 2, np.array([{}], object), pickled=True), "2.npy is not a plain .npy array"),
    (replace("labels", 2, np.array([1, 2])), r"2.npy holds int64 \(2,\); one integer"),
    (replace("labels", 2, np.array(-1)), "'00000002' has label -1"),
    (lambda root: (root / "imagenet256_labels").rename(root / "labels"), "imagenet256_labels is missing"),
    (lambda root: (root / "other_codes").mkdir(), "found: imagenet256_codes, other_codes"),
    (lambda root: (root / "imagenet256_codes").rename(root / "codes"), "found: none"),
])
def test_what_cannot_be_converted_is_named(original, tmp_path, damage, message):
    damage(original)
    with pytest.raises(InputError, match=message):
        convert_npy_codes(original, tmp_path / "out", codebook_size=100)
    assert not (tmp_path / "out" / "metadata.json").exists()


@pytest.mark.parametrize("arguments, message", [
    ([], "give a tokenizer and a directory of image shards, or --from-npy"),
    (["tokenizer"], "give a tokenizer and a directory of image shards"),
    (["tokenizer", "shards", "--codebook-size", "5"], "--codebook-size goes with --from-npy"),
    (["tokenizer", "shards", "--workers", "-1"], "--workers is -1"),
    (["--from-npy", "x"], "needs --codebook-size"),
    (["--from-npy", "x", "--codebook-size", "0"], "codebook size is 0"),
    (["--from-npy", "x", "--codebook-size", "5"], "x does not exist"),
    (["--from-npy", "x", "--codebook-size", "5", "--crops", "flip"], "--crops would do nothing"),
    (["tokenizer", "--from-npy", "x", "--codebook-size", "5"], "tokenizer would do nothing"),
])
def test_arguments_that_do_not_belong_together_are_refused(tmp_path, capsys, arguments, message):
    assert main(["extract-codes", *arguments, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_training_says_how_to_convert_them(original):
    with pytest.raises(InputError, match=r"has no metadata.json.*--from-npy"):
        CodeDataset.open(original)
