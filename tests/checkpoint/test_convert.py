"""`gigatok-ds convert`: from each format to each, whole or not at all, a few tensors at a time."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from golden_models import original_weights
from rank_processes import wait_for
from rank_runs import run_ranks, start_rank
from safetensors.torch import load_file
from small_models import small_gpt, small_tokenizer
from training_runs import GPT as GPT_RECIPE
from training_runs import prepare

from gigatok_ds import InputError, load_gpt, load_tokenizer
from gigatok_ds.checkpoint import verification
from gigatok_ds.checkpoint.fragments import SavedEngine
from gigatok_ds.checkpoint.model_sources import open_model
from gigatok_ds.checkpoint.original import read_original, save_original, to_original
from gigatok_ds.checkpoint.pt_file import write_pt
from gigatok_ds.checkpoint.standalone import damaged_weights, lazy_weights, save_standalone
from gigatok_ds.checkpoint.tensor_files import LazyTensors, Spec, shapes_of, write_tensors
from gigatok_ds.cli.main import main
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe


def specs_of(tensors):
    return {name: Spec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def convert(capsys, *words):
    code = main(["convert", *map(str, words)])
    return code, "".join(capsys.readouterr())


def train(recipe, out, settings):
    from gigatok_ds.training.run import run_training

    run_training(recipe, out, settings)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A finished run of each kind, and a folder: with an average and checkpoints of steps 4 and 8, of two ranks that
    share moments, or all."""
    folder = tmp_path_factory.mktemp("convert")
    data = prepare(folder)
    for kind, stage in (("tokenizer", 1), ("gpt", 3)):
        recipe = load_recipe(folder / f"{kind}.yaml", [*data[kind], "training.ema_decay=0.8"])
        run_ranks(train, 2, recipe, folder / kind, zero_settings(stage))
    return folder


def of_every_type():
    draw = torch.Generator().manual_seed(0)
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.uint8]
    tensors = {f"layer{i}.w": (torch.randn(7 + i, 3, generator=draw) * 10).to(kinds[i % len(kinds)]) for i in range(20)}
    return tensors | {"empty": torch.empty(0, 3), "scalar": torch.tensor(3.5)}


def test_written_files_are_what_torch_and_safetensors_write(tmp_path):
    """Every element type, an empty tensor and a scalar; checksums of the zip included."""
    tensors = of_every_type()
    write_tensors(tmp_path / "x.safetensors", specs_of(tensors), tensors.__getitem__)
    write_pt(tmp_path / "x.pt", "model", specs_of(tensors), tensors.__getitem__)
    assert zipfile.ZipFile(tmp_path / "x.pt").testzip() is None
    loads = [load_file(tmp_path / "x.safetensors")] + [
        torch.load(tmp_path / "x.pt", weights_only=True, mmap=mmap)["model"] for mmap in (False, True)]
    for loaded in loads:
        assert loaded.keys() == tensors.keys()
        for name, value in tensors.items():
            assert loaded[name].dtype == value.dtype and torch.equal(loaded[name], value), name
    assert list(loads[1]) == list(tensors), "in the order of the state_dict"


@pytest.mark.parametrize("kind", ["tokenizer", "gpt"])
def test_a_run_becomes_a_model_a_pt_and_a_model_again(runs, kind, tmp_path, capsys):
    code, said = convert(capsys, runs / kind, tmp_path / "model", "--weights", "model", "--verify")
    assert code == 0 and "equal bit for bit, and what the model in training gave (probe.npz)" in said, said
    part = "generator" if kind == "tokenizer" else "gpt"
    trained = SavedEngine(runs / kind / "checkpoints" / "step-0000008" / part).tensors()
    ours = lazy_weights(tmp_path / "model")
    assert ours.keys() == trained.keys() and all(torch.equal(ours[name], trained[name]) for name in ours)
    assert damaged_weights(tmp_path / "model") is None
    assert convert(capsys, tmp_path / "model", tmp_path / "m.pt", "--to", "original", "--verify")[0] == 0
    assert convert(capsys, tmp_path / "m.pt", tmp_path / "again", "--recipe", runs / f"{kind}.yaml", "--verify")[0] == 0
    again = lazy_weights(tmp_path / "again")
    assert again.keys() == ours.keys() and all(torch.equal(again[name], ours[name]) for name in ours)


def test_codes_are_those_of_the_model_in_training(runs, tmp_path, capsys):
    assert convert(capsys, runs / "tokenizer", tmp_path / "model", "--weights", "model")[0] == 0
    probe = dict(np.load(runs / "tokenizer" / "probe.npz"))
    assert torch.equal(load_tokenizer(tmp_path / "model").encode(torch.from_numpy(probe["images"])),
                       torch.from_numpy(probe["codes"]))


def test_which_checkpoint_and_which_weights(runs, tmp_path, capsys):
    """The average by default; --step and a checkpoint's own directory mean the same."""
    ema, part = tmp_path / "ema", "checkpoints/step-0000004"
    assert convert(capsys, runs / "gpt", ema)[0] == 0
    saved = SavedEngine(runs / "gpt" / "checkpoints" / "step-0000008" / "gpt")
    assert all(torch.equal(lazy_weights(ema)[name], saved.read("ema", name)) for name in saved.layout.parameters)
    described = json.loads((ema / "config.json").read_text())
    assert described["provenance"]["weights"] == "ema" and "loss" in described["provenance"]["metrics"]
    assert convert(capsys, runs / "gpt", tmp_path / "a", "--step", "4")[0] == 0
    assert convert(capsys, runs / "gpt" / part, tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    code, said = convert(capsys, runs / "gpt", tmp_path / "c", "--step", "5")
    assert code == 2 and "no complete checkpoint of step 5; there are 4, 8" in said


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_parameters_are_rounded_and_buffers_are_not(runs, dtype, tmp_path, capsys):
    code, said = convert(capsys, runs / "tokenizer", tmp_path / "half", "--dtype", dtype, "--verify")
    assert code == 0 and "bit for bit" in said
    held, target = lazy_weights(tmp_path / "half"), {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    model = load_tokenizer(tmp_path / "half")
    for name, parameter in model.named_parameters():
        assert held[name].dtype == target and parameter.dtype == torch.float32
    assert held["quantizer.codebook_used"].dtype == torch.int32


def test_training_starts_from_a_model(runs, tmp_path, capsys):
    assert convert(capsys, runs / "gpt", tmp_path / "model")[0] == 0
    code, said = convert(capsys, tmp_path / "model", tmp_path / "fine", "--to", "training", "--recipe",
                         runs / "gpt.yaml", "training.steps=2", *[f"data.{split}={runs / name}" for split, name in
                                               (("train", "codes"), ("validation", "test_codes"))])
    assert code == 0 and f"gigatok-ds train {tmp_path / 'fine'}/recipe.yaml --out {tmp_path / 'fine'}" in said
    run_ranks(train, 2, load_recipe(tmp_path / "fine" / "recipe.yaml"), tmp_path / "fine", zero_settings(1))
    assert (tmp_path / "fine" / "checkpoints" / "step-0000002" / "state.json").is_file()


def llamagen(path, **more):
    """A file as LlamaGen's, small: 2D RoPE on 4 x 4 codes, and what its generation leaves behind."""
    gpt = small_gpt(sequence_length=16, positions="rope_2d")
    weights = gpt.state_dict() | {"layers.0.attention.kv_cache.k_cache": torch.zeros(2, 2, 24, 16),
                                  "freqs_cis": torch.zeros(3)}
    torch.save({"model": weights | more, "optimizer": {"state": {}}, "steps": 300000,
                "args": argparse.Namespace(lr=1e-4)}, path)
    return gpt


def test_a_gpt_of_llamagen_is_read_where_it_is_of_our_kind(tmp_path, capsys):
    (tmp_path / "gpt.yaml").write_text(GPT_RECIPE)
    gpt = llamagen(tmp_path / "c2i.pt").requires_grad_(False)
    options = ["--recipe", tmp_path / "gpt.yaml", "model.sequence_length=16", "model.positions=rope_2d"]
    assert convert(capsys, tmp_path / "c2i.pt", tmp_path / "out", *options, "--verify")[0] == 0
    codes, classes = torch.arange(30).view(2, 15), torch.tensor([0, 5])
    assert torch.equal(load_gpt(tmp_path / "out")(codes, classes), gpt(codes, classes))
    llamagen(tmp_path / "t2i.pt", **{"cls_embedding.cap_proj.fc1.weight": torch.zeros(2, 2)})
    code, said = convert(capsys, tmp_path / "t2i.pt", tmp_path / "t2i", *options)
    assert code == 2 and "also holds cls_embedding.cap_proj.fc1.weight" in said and not (tmp_path / "t2i").exists()


def test_what_makes_no_sense_is_refused(runs, tmp_path, capsys):
    run, gpt = runs / "gpt", tmp_path / "model"
    convert(capsys, run, gpt)
    for words, message in [
        ((run, tmp_path / "x", "--recipe", "GPT-B"), "says itself what it is"),
        ((run, tmp_path / "x", "a.b=1"), "there is no --recipe"),
        ((run, tmp_path / "x", "--to", "training"), "needs --recipe"),
        ((run, tmp_path / "x", "--fresh", "norm"), "--fresh is for --to training only"),
        ((gpt, tmp_path / "x", "--weights", "ema"), "holds one set of weights"),
        ((gpt, tmp_path / "x", "--to", "training", "--recipe", runs / "tokenizer.yaml"),
         "holds a gpt, but recipe tiny_tokenizer"),
        ((run, gpt), "exists already"),
        ((tmp_path / "nothing", tmp_path / "x"), "does not exist"),
    ]:
        code, said = convert(capsys, *words)
        assert code == 2 and message in said and len(said.splitlines()) == 1, said
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("spoil", ["flip", "cut", "bomb"])
@pytest.mark.parametrize("place", ["run", "model"])
def test_damage_is_named_and_nothing_is_executed(runs, place, spoil, tmp_path, capsys):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    source = tmp_path / "source"
    if place == "run":
        subprocess.run(["cp", "-r", runs / "gpt", source], check=True)
        file = source / "checkpoints" / "step-0000008" / "gpt" / "tensor-000-data-00001.safetensors"
    else:
        convert(capsys, runs / "gpt", source)
        file = source / "model.safetensors"
    full = file.read_bytes()
    if spoil == "bomb":
        torch.save({"model": Bomb()}, file)
    else:
        file.write_bytes(full[:-100] if spoil == "cut" else full[:-100] + bytes([full[-100] ^ 1]) + full[-99:])
    if (place, spoil) == ("model", "flip"):
        assert file.name in damaged_weights(source)  # whole as a file: found when its checksum is asked for
    else:
        code, said = convert(capsys, source, tmp_path / "out")
        assert code == 2 and file.name in said and "damaged" in said, said
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out").exists()


def test_a_difference_is_found_and_the_result_removed(runs, tmp_path, capsys, monkeypatch):
    read = verification._rounded
    seen = []

    def once_wrong(value, spec):
        seen.append(spec)
        return read(value, spec) + (len(seen) == 4)

    monkeypatch.setattr(verification, "_rounded", once_wrong)
    for words in ((tmp_path / "out",), (tmp_path / "out.pt", "--to", "original")):
        seen.clear()
        code, said = convert(capsys, runs / "gpt", *words, "--verify")
        assert code == 2 and "verification failed" in said and "was not written as it was read" in said
    assert os.listdir(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 100 kB; needs the right to mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder], capture_output=True,
                      check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("to", ["standalone", "original", "training"])
def test_a_full_disk_leaves_nothing_and_says_so(runs, small_disk, to, capsys):
    recipe = ["--recipe", runs / "tokenizer.yaml"] if to == "training" else []
    code, said = convert(capsys, runs / "tokenizer", small_disk / "out", "--to", to, *recipe)
    assert code == 2 and "could not be written" in said and "make room" in said, said
    assert os.listdir(small_disk) == []


BIG = {f"w{i}": Spec(torch.float32, (16, 1024, 1024)) for i in range(10)}  # 640 MiB

MEASURED = """
import sys
from pathlib import Path
import torch
from gigatok_ds.checkpoint.pt_file import lazy_tensors, write_pt
from gigatok_ds.checkpoint.tensor_files import Spec, TensorFiles, write_tensors
BIG = {f"w{i}": Spec(torch.float32, (16, 1024, 1024)) for i in range(10)}
folder, task = Path(sys.argv[1]), sys.argv[2]
files = TensorFiles()
if task == "to-pt":
    write_pt(folder / "x.pt", "model", BIG, lambda name: files.read(folder / "x.safetensors", name))
elif task == "from-pt":
    read = lazy_tensors(folder / "x.pt", lambda content: content["model"])
    write_tensors(folder / "y.safetensors", BIG, read.__getitem__)
# Not ru_maxrss, which begins with what the parent process held.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.slow
def test_few_tensors_are_in_memory_at_a_time(tmp_path):
    """640 MiB of ten tensors: at most 500 MiB more than a process that converts nothing, mapped pages included."""
    write_tensors(tmp_path / "x.safetensors", BIG, lambda name: torch.full(BIG[name].shape, float(name[1:])))
    peaks = []
    for task in ("nothing", "to-pt", "from-pt"):
        finished = subprocess.run([sys.executable, "-c", MEASURED, tmp_path, task], capture_output=True, text=True,
                                  check=True, cwd=os.path.dirname(__file__))
        peaks.append(int(finished.stdout) / 1024)
    assert (tmp_path / "x.safetensors").read_bytes() == (tmp_path / "y.safetensors").read_bytes()
    assert max(peaks) - peaks[0] < 500, peaks


def save_slowly(folder, way):
    """Write a model a tensor at a time, saying so."""
    gpt = small_gpt()
    weights = gpt.state_dict()

    def read(name):
        print("writing", flush=True)
        time.sleep(0.2)
        return weights[name]

    {"a": save_standalone, "b": save_original}[way](folder / way, gpt.config, LazyTensors(shapes_of(weights), read))


@pytest.mark.parametrize("way", ["a", "b"])
def test_killed_while_it_writes_it_leaves_no_result(tmp_path, way):
    said = tmp_path / "said.txt"
    process = start_rank(save_slowly, tmp_path, way, rank=0, ranks=1, port=0, output=(said, said))
    wait_for(lambda: said.exists() and "writing" in said.read_text(), 60)
    time.sleep(0.3)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not (tmp_path / way).exists()


@pytest.mark.parametrize("recipe", ["VQ_SS256", pytest.param("VQ_SS256_2d", marks=pytest.mark.slow), "GPT-B"])
def test_full_size_golden_weights_survive_the_way_there_and_back(recipe, tmp_path, capsys):
    """.pt -> standalone -> .pt, identical tensor for tensor."""
    weights = original_weights(load_recipe(recipe).model)
    write_pt(tmp_path / "a.pt", "model", specs_of(weights), weights.__getitem__)
    assert convert(capsys, tmp_path / "a.pt", tmp_path / "model", "--recipe", recipe)[0] == 0
    assert convert(capsys, tmp_path / "model", tmp_path / "b.pt", "--to", "original")[0] == 0
    again = torch.load(tmp_path / "b.pt", weights_only=True, mmap=True)["model"]
    assert again.keys() == weights.keys()
    assert all(again[name].dtype == value.dtype and torch.equal(again[name], value) for name, value in weights.items())


def test_an_original_opened_twice_reads_the_same(tmp_path, monkeypatch):
    """The mapping is renewed in between, after every tensor here."""
    from gigatok_ds.checkpoint import pt_file

    gpt = small_gpt()
    save_original(tmp_path / "t.pt", gpt.config, gpt.state_dict())
    monkeypatch.setattr(pt_file, "_MAPPED_BYTES", 0)
    expected, found = to_original(gpt.config, gpt.state_dict()), read_original(tmp_path / "t.pt", kind="gpt")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    with pytest.raises(InputError, match="exists already"):
        save_original(tmp_path / "t.pt", gpt.config, gpt.state_dict())
    save_standalone(tmp_path / "m", gpt.config, gpt.state_dict())
    with pytest.raises(InputError, match="does not say what it is"):
        open_model(tmp_path / "t.pt")


def test_a_model_in_a_directory_called_checkpoints_is_no_checkpoint_of_a_run(tmp_path, capsys):
    """As all of the documentation has it: checkpoints/tokenizer-ss."""
    tokenizer, folder = small_tokenizer(), tmp_path / "checkpoints" / "tokenizer-ss"
    save_standalone(folder, tokenizer.config, tokenizer.state_dict())
    assert convert(capsys, folder, tmp_path / "t.pt", "--to", "original")[0] == 0
    assert convert(capsys, folder, tmp_path / "checkpoints" / "again", "--verify")[0] == 0
