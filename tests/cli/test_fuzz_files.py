"""Files of every kind that are read, damaged at random: what reads them takes them or refuses them in one line.

Few inputs of each kind always, tens of thousands of each with `-m slow`. What may end the interpreter is tried in a
child.
"""

import functools
import io
import json
import multiprocessing
import resource
import shutil
import signal
import struct
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch
from imagenet_files import devkit
from made_pictures import corrupted
from places import TESTS
from pyarrow import parquet
from small_models import small_gpt
from small_shards import plain_tar
from training_runs import GPT

from gigatok_ds.checkpoint.class_names import classes_bytes, read_classes
from gigatok_ds.checkpoint.fragments import SavedEngine, SavedLayout
from gigatok_ds.checkpoint.inspection import inspect
from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.checkpoint.pt_file import load_plain_data
from gigatok_ds.checkpoint.run_directory import State, _digest, read_state
from gigatok_ds.checkpoint.standalone import identify, load_gpt, save_standalone
from gigatok_ds.config.deepspeed import read_settings
from gigatok_ds.config.load import load_recipe
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.image_sets import NpzImages
from gigatok_ds.evaluation.results import Results, read_figures, write_results
from gigatok_ds.packing import parquet_files
from gigatok_ds.packing.chunked_source import chunked_source
from gigatok_ds.packing.devkit import devkit_classes
from gigatok_ds.packing.image_sources import open_source
from gigatok_ds.packing.label_files import read_labels
from gigatok_ds.packing.npy_codes import NpyCodes
from gigatok_ds.sampling.collection import collection_at
from gigatok_ds.shards.contents import load_index
from gigatok_ds.shards.tar_scan import scan_tar
from gigatok_ds.training.run_status import status

FEW, MANY = 20, 20_000
SECONDS = 30
VALUES = [None, True, False, 0, -1, 1.5, 10**400, 2**63, -(10**30), float("nan"), float("inf"), "", "x", "\x1b]0;x\x07",
          "\ud800", "../x", [], [[]], {}, {"": None}, [1, "x"], {"dtype": 1}, 10**9]


def altered(value, rng):
    """A JSON value in which one part is another, is lacking, or has another name."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        name = list(value)[int(rng.integers(len(value)))]
        match int(rng.integers(8)):
            case 0:
                return {key: item for key, item in value.items() if key != name}
            case 1:
                return {f"{key}x" if key == name else key: item for key, item in value.items()}
            case _:
                return {**value, name: altered(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = int(rng.integers(len(value)))
        return [*value[:at], altered(value[at], rng), *value[at + 1 :]]
    return VALUES[int(rng.integers(len(VALUES)))]


def damaged_json(data, rng):
    """Its bytes changed, or its values."""
    if rng.random() < 0.4:
        return corrupted(data, rng)
    lines = data.splitlines(keepends=True) if data.count(b"\n{") else [data]
    at = int(rng.integers(len(lines)))
    text = json.dumps(altered(json.loads(lines[at]), rng)) + "\n"
    return b"".join([*lines[:at], text.encode(), *lines[at + 1 :]])


def damaged_state(data, rng):
    """state.json with other values and the right checksum."""
    if rng.random() < 0.2:
        return damaged_json(data, rng)
    value = altered({key: item for key, item in json.loads(data).items() if key != "sha256"}, rng)
    return json.dumps({**value, "sha256": _digest(value)} if isinstance(value, dict) else value).encode()


def damaged_zip(data, rng):
    """An archive with whole checksums around damaged members, or a damaged archive."""
    if rng.random() < 0.4:
        return corrupted(data, rng)
    full, kind = io.BytesIO(), [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2][int(rng.integers(3))]
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(full, "w", kind) as target:
        names = source.namelist()
        wrong = names[int(rng.integers(len(names)))]
        for name in names:
            content = source.read(name)
            if name == wrong and rng.random() < 0.9:
                content = damaged_npy(content, rng) if content[:6] == b"\x93NUMPY" else corrupted(content, rng)
            target.writestr(f"{name}x" if name == wrong and rng.random() < 0.1 else name, content)
    return full.getvalue()


HEADERS = ["{'descr': '<i8', 'fortran_order': False, 'shape': (10**15,), }",
           "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "(" * 300,
           "{'descr': '<f4', 'fortran_order': True, 'shape': (-1, 3), }", "{'descr': '<i8', 'fortran_order': False, "
                                                                          "'shape': (",
           "{'descr': '<U99999999', 'fortran_order': False, 'shape': (4000000000,), }",
           "{'descr': [('a', '<i4')], 'shape': (2,)}",
           "{'descr': '<i8', 'fortran_order': False, 'shape': (9223372036854775807, 4, 4), }",
           "{'descr': 'é', 'shape': 1}"]


def damaged_npy(data, rng):
    if rng.random() < 0.5:
        return corrupted(data, rng)
    header = HEADERS[int(rng.integers(len(HEADERS)))].encode("latin-1")
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(int(rng.integers(64)))


def damaged_tar(data, rng):
    """Headers that claim other sizes and types, with right checksums; or any damage."""
    if rng.random() < 0.3:
        return corrupted(data, rng)
    data = bytearray(data)
    at = 512 * int(rng.integers(max(len(data) // 512 - 4, 1)))
    header = data[at : at + 512]
    sizes = [b"77777777777\0", b"-0000000001\0", b"\x80" + b"\xff" * 11, b"\xff" * 11 + b"\0",
             b"\x80\0\0\0\x7f" + b"\xff" * 7, b"\xff" * 12, b"           \0", b"00000001000\0"]
    header[124:136] = sizes[int(rng.integers(len(sizes)))]
    header[156:157] = [b"0", b"L", b"K", b"x", b"g", b"S", b"1", b"5", b"V"][int(rng.integers(9))]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % (sum(header) & 0o777777)
    data[at : at + 512] = header
    return bytes(data)


def damaged_devkit(data, rng):
    """A whole archive around a damaged meta.mat or list."""
    import gzip

    if rng.random() < 0.1:
        return corrupted(data, rng)
    if rng.random() < 0.2:
        return gzip.compress(damaged_tar(gzip.decompress(data), rng), 1)
    full = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as source, tarfile.open(fileobj=full, mode="w:gz",
                                                                        compresslevel=1) as target:
        for member in source:
            content = source.extractfile(member).read()
            if member.name.endswith(".mat") or rng.random() < 0.1:
                content = corrupted(content, rng)
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    return full.getvalue()


class World:
    """A folder with one good file of each kind, made once."""

    def __init__(self, root):
        self.root = root
        gpt = small_gpt()
        save_standalone(root / "model", gpt.config, gpt.state_dict(),
                        provenance={"recipe": "r", "metrics": {"loss": 1.0}}, classes=["cat", "dog"])
        torch.save({"model": gpt.state_dict(), "steps": 3}, root / "new.pt")
        torch.save({"model": gpt.state_dict()}, root / "old.pt", _use_new_zipfile_serialization=False)
        run = root / "run"
        (run / "checkpoints").mkdir(parents=True)
        (run / "recipe.yaml").write_text(GPT)
        (run / "classes.json").write_bytes(classes_bytes(["cat", "dog"]))
        (run / "history.jsonl").write_text("".join(json.dumps({"time": 1.7e9 + n, "event": event, "step": n,
                                                               "reason": "r"}) + "\n"
                                                   for n, event in enumerate(("started", "skipped", "failed"))))
        (run / "metrics.jsonl").write_text("".join(
            json.dumps({"step": n, "time": 1.7e9 + n, "loss": 1.0, "throughput/step_seconds": 0.5,
                        "throughput/images_per_second": 3.0} if n else {"step": 1, "time": 1.7e9, "warning": "w"})
                        + "\n"
            for n in range(3)))
        (run / "heartbeat.json").write_text(json.dumps({"step": 3, "time": 1.7e9}) + "\n")
        step = root / "step-0000001"
        (step / "gpt").mkdir(parents=True)
        layout = SavedLayout(tensor_size=1, data_size=1, parameters={"w": [2, 3]}, cuts={}, kinds=["weights"],
                             adam_steps={"w": 1},
                        counters={"a": 1.0})
        (step / "gpt" / "engine.json").write_text(layout.to_json())
        from safetensors.torch import save_file

        save_file({"weights/w": torch.zeros(6)}, step / "gpt" / "tensor-000-data-00000.safetensors",
                  {"starts": '{"weights/w": 0}'})
        save_file({"buffer": torch.zeros(2)}, step / "gpt" / "whole-tensor-000.safetensors")
        state = State(step=1, samples=2, parts=["gpt"], world_size=1, tensor_size=1, stage=1, metrics={"loss": 1.0},
                      guard={}, files={"gpt/engine.json": "0"})
        (step / "state.json").write_text(state.to_json())
        np.savez(root / "stored.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8), arr_1=np.arange(3))
        np.savez_compressed(root / "packed.npz", arr_0=np.zeros((3, 4, 4, 3), np.uint8), arr_1=np.arange(3),
                            **{name: np.zeros((4, 4)) for name in ("mu", "sigma", "mu_s", "sigma_s")})
        plain_tar(root / "shards" / "x.tar", [(f"k{n}.{end}", b"1") for n in range(3) for end in ("png", "cls")])
        from gigatok_ds.shards.index import ShardIndex

        ShardIndex.open(root / "shards")
        for name in ("a_codes", "a_labels"):
            (root / "npy" / name).mkdir(parents=True)
        np.save(root / "npy" / "a_codes" / "0.npy", np.zeros((2, 4), np.int64))
        np.save(root / "npy" / "a_labels" / "0.npy", np.array(3))
        (root / "labels.txt").write_text("a.jpg n1\nb.jpg n2\n")
        (root / "labels.csv").write_text("key,label\na,n1\nb,n2\n")
        parquet.write_table(pyarrow.Table.from_pylist([{"key": "a", "label": "n1"}, {"key": "b", "label": "n2"}]),
                            root / "labels.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(
            [{"image": {"bytes": b"image", "path": f"{number}.jpg"}, "label": number} for number in range(4)]),
            root / "images.parquet", row_group_size=2)
        (root / "lists").mkdir()
        (root / "lists" / "a.jpg").write_bytes(b"image")
        (root / "lists" / "list.txt").write_text("a.jpg\na.jpg\n")
        for kind in ("mds", "litdata"):
            shutil.copytree(TESTS / "packing/files" / kind, root / kind)
        devkit(root)
        (root / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}))
        write_results(root / "results", Results(title="t", figures={"gfid": 1.0}, settings={"a": 1}))
        (root / "codes").mkdir()
        (root / "codes" / "metadata.json").write_text(json.dumps({"format": "gigatok-ds-codes/1", "codebook_size": 4,
                                                                  "latent_tokens": 2, "augmentations": 1, "count": 3,
                                                                  "provenance": {}}))


def read_engine(path):
    saved = SavedEngine(path.parent)
    weights = saved.tensors()
    return {name: weights[name] for name in weights}


def read_npy_codes(path):
    source = NpyCodes.open(path.parents[1])
    return source.sample(0)


def read_parquet_images(path):
    for cached in (parquet_files._opened, parquet_files._group):
        cached.cache_clear()
    return [image.read() for image in open_source(path).images]


def read_chunks(path):
    return [(image.read(), image.read_caption()) for image in chunked_source(path, None).images]


# kind: the file, how it is damaged, and what reads it, given its path
KINDS = {
    "heartbeat.json": ("run/heartbeat.json", damaged_json, lambda path: status(path.parent)),
    "history.jsonl": ("run/history.jsonl", damaged_json, lambda path: status(path.parent)),
    "metrics.jsonl": ("run/metrics.jsonl", damaged_json, lambda path: status(path.parent)),
    "recipe.yaml": ("run/recipe.yaml", lambda data, rng: corrupted(data, rng), lambda path: load_recipe(str(path))),
    "classes.json": ("run/classes.json", damaged_json, read_classes),
    "config.json": ("model/config.json", damaged_json, lambda path: (inspect(path.parent), identify(path.parent),
                                                                     open_model(path.parent), load_gpt(path.parent))),
    "model.safetensors": ("model/model.safetensors", lambda data, rng: corrupted(data, rng),
                          lambda path: load_gpt(path.parent)),
    "state.json": ("step-0000001/state.json", damaged_state,
                   lambda path: (read_state(path.parent), inspect(path.parent))),
    "engine.json": ("step-0000001/gpt/engine.json", damaged_json, read_engine),
    "an optimizer's safetensors": ("step-0000001/gpt/tensor-000-data-00000.safetensors", lambda data,
                                   rng: corrupted(data, rng), read_engine),
    ".pt": ("new.pt", lambda data, rng: corrupted(data, rng), load_plain_data),
    "legacy .pt": ("old.pt", lambda data, rng: corrupted(data, rng), load_plain_data),
    "index.npz": ("shards/index.npz", damaged_zip, None),
    "index.json": ("shards/index.json", damaged_json, lambda path: load_index(path.parent)),
    "stored .npz": ("stored.npz", damaged_zip, lambda path: NpzImages(path, any_dtype=True)),
    "packed .npz": ("packed.npz", damaged_zip, lambda path: NpzImages(path, any_dtype=True)),
    "sampled .npz": ("packed.npz", damaged_zip, lambda path: collection_at(path).finished(3)),
    ".npy of codes": ("npy/a_codes/0.npy", damaged_npy, read_npy_codes),
    ".npy of a label": ("npy/a_labels/0.npy", damaged_npy, read_npy_codes),
    "labels": ("labels.txt", lambda data, rng: corrupted(data, rng),
               lambda path: read_labels(path, ["a.jpg", "b.jpg"])),
    "labels.csv": ("labels.csv", lambda data, rng: corrupted(data, rng), lambda path: read_labels(path, ["a", "b"])),
    "labels.parquet": ("labels.parquet", lambda data, rng: corrupted(data, rng),
                       lambda path: read_labels(path, ["a", "b"])),
    "images.parquet": ("images.parquet", lambda data, rng: corrupted(data, rng), read_parquet_images),
    "list of images": ("lists/list.txt", lambda data, rng: corrupted(data, rng),
                       lambda path: open_source(path, unlabelled=True)),
    "MDS index": ("mds/index.json", damaged_json, lambda path: read_chunks(path.parent)),
    "MDS shard": ("mds/shard.00000.mds", lambda data, rng: corrupted(data, rng), lambda path: read_chunks(path.parent)),
    "litdata index": ("litdata/index.json", damaged_json, lambda path: read_chunks(path.parent)),
    "litdata chunk": ("litdata/chunk-0-0.bin", lambda data, rng: corrupted(data, rng),
                      lambda path: read_chunks(path.parent)),
    "devkit": ("devkit.tar.gz", damaged_devkit, devkit_classes),
    "tar": ("shards/x.tar", damaged_tar, scan_tar),
    "DeepSpeed's JSON": ("ds.json", damaged_json, read_settings),
    "results.json": ("results/results.json", damaged_json, lambda path: read_figures(path.parent)),
    "metadata.json": ("codes/metadata.json", damaged_json, lambda path: CodeDataset.open(path.parent)),
}


@pytest.fixture(autouse=True)
def recipes_once(monkeypatch):
    """A recipe that is not what is damaged is read once."""
    monkeypatch.setattr("gigatok_ds.training.run_status.load_recipe", functools.cache(load_recipe))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("fuzz")).root


def read_table(path):
    """An index whose description has the right hash of a damaged table."""
    import hashlib

    description = json.loads((path.parent / "index.json").read_bytes())
    description["table_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (path.parent / "index.json").write_text(json.dumps(description))
    return load_index(path.parent)


def try_many(kind, world, folder, count, first=0):
    """How many of `count` inputs were refused; anything but an InputError of one line, or of the system, is raised."""
    name, damage, read = KINDS[kind]
    read, top = read or read_table, Path(name).parts[0]
    if (world / top).is_dir():
        shutil.copytree(world / top, folder / top)
    good, refused = (world / name).read_bytes(), 0

    def expire(number, frame):
        raise TimeoutError(f"{kind}: an input took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, expire)
    try:
        for number in range(first, first + count):
            data = damage(good, np.random.default_rng(number))
            (folder / name).write_bytes(data)
            signal.alarm(SECONDS)
            try:
                read(folder / name)
            except InputError as error:
                assert "\n" not in str(error), error
                refused += 1
            except OSError as error:
                assert error.errno is not None, error
                refused += 1
            except BaseException as error:
                raise AssertionError(f"{kind}, input {number}: {type(error).__name__}: {error}") from error
            signal.alarm(0)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    return refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_refused_in_one_line(kind, world, tmp_path):
    assert try_many(kind, world, tmp_path, FEW) > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", [3173, 18197], ids=["a short row group", "a path of bytes"])
def test_parquet_is_not_taken_at_its_word(number, world, tmp_path):
    """Found by the many, below."""
    assert try_many("images.parquet", world, tmp_path, 1, first=number) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_many_damaged_files_are_read_or_refused_in_one_line(kind, world, tmp_path):
    """In a child: a parser in C that ends the interpreter ends the child only. Memory is bounded."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=try_all, args=(kind, world, tmp_path, sender))
    process.start()
    sender.close()
    try:
        said, peak = receiver.recv()
    except EOFError:
        said, peak = "the child died", 0
    process.join()
    assert said == "" and process.exitcode == 0
    assert peak < 4 * 2**20  # KiB


def try_all(kind, world, folder, sender):
    """In the child: says what went wrong, and the most memory that was used."""
    said = ""
    try:
        for first in range(0, MANY, 500):
            part = folder / str(first)
            part.mkdir()
            try_many(kind, world, part, 500, first=1000 + first)
            shutil.rmtree(part)
    except BaseException as error:
        said = str(error)
    sender.send((said, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


BOMBS = {
    "deflate": lambda: zipped(b"\0" * 2**28),
    "claims": lambda: zipped(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(HEADERS[5])) + HEADERS[5].encode()),
}


def zipped(content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", content)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", BOMBS)
def test_what_unpacks_to_much_more_is_refused(kind, tmp_path):
    from gigatok_ds.npy_files import read_npz

    (tmp_path / "x.npz").write_bytes(BOMBS[kind]())
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=r"x.npz is damaged"):
            read_npz(tmp_path / "x.npz", most=2**20)
        assert tracemalloc.get_traced_memory()[1] < 2**25
    finally:
        tracemalloc.stop()


def test_the_devkit_is_read_as_scipy_reads_it(tmp_path):
    from scipy.io import savemat

    from gigatok_ds.packing.devkit import variable

    records = np.zeros(5, dtype=[("ILSVRC2012_ID", "f8"), ("WNID", "O"), ("words", "O"), ("children", "O")])
    for number in range(5):
        records[number] = (number + 1, f"n{number:08d}", "tench, Tinca tinca é", np.arange(number, dtype=np.uint8))
    for order in (False, True):
        buffer = io.BytesIO()
        savemat(buffer, {"other": np.eye(3), "synsets": records[:, None]}, do_compression=order)
        found = variable(buffer.getvalue(), "synsets")
        assert [synset["ILSVRC2012_ID"] for synset in found] == [[1], [2], [3], [4], [5]]
        assert [synset["WNID"] for synset in found] == [[f"n{number:08d}"] for number in range(5)]
        assert found[3]["words"] == ["tench, Tinca tinca é"] and found[4]["children"] == [0, 1, 2, 3]
