"""Encoders and decoders as torch.export programs and ONNX files, run without this package's kernels."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from small_models import small_tokenizer

from gigatok_ds import InputError
from gigatok_ds.checkpoint import graphs
from gigatok_ds.checkpoint.graphs import SUFFIXES, export_graph
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.cli.main import main
from gigatok_ds.config.model import CNNConfig, TransformerSize

LAYOUTS = {"1d": {}, "2d": {"layout": "2d", "latent_tokens": 64}}

WITHOUT_US = """
import sys
sys.modules["gigatok_ds"] = None
import numpy as np
def run(file, inputs):
    if file.endswith(".pt2"):
        import torch
        with torch.no_grad():
            return torch.export.load(file).module()(torch.from_numpy(inputs)).numpy()
    import onnxruntime
    session = onnxruntime.InferenceSession(file)
    return session.run(None, {session.get_inputs()[0].name: inputs})[0]
values = np.load(sys.argv[1])
for number, file in enumerate(sys.argv[2:]):
    values = run(file, values[:1] if number else values)
    np.save(file + ".npy", values)
"""


def shallow_tokenizer(**changes):
    """One block of each kind, of which others are repetitions: exporting takes as long as there are operators."""
    one = TransformerSize(width=32, layers=1, heads=2)
    cnn = CNNConfig(base_channels=32, encoder_multipliers=(1, 2), decoder_multipliers=(1, 2), residual_blocks=1)
    return small_tokenizer(encoder=one, decoder=one, cnn=cnn, **changes)


def run_alone(inputs, *files):
    """What each graph gives in a process that cannot import gigatok_ds; the second gets the first row of the first's
    result.
    """
    source = files[0].with_name("in.npy")
    np.save(source, inputs.numpy())
    subprocess.run([sys.executable, "-c", WITHOUT_US, source, *files], check=True)
    return [torch.from_numpy(np.load(f"{file}.npy")) for file in files]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(tokenizer, its graphs' files by part, what was said of each) of a layout and a format, exported once."""
    made = {}

    def export(layout, format):
        if (layout, format) not in made:
            tokenizer, folder = shallow_tokenizer(**LAYOUTS[layout]), tmp_path_factory.mktemp(f"{layout}-{format}")
            files = {part: folder / (part + SUFFIXES[format]) for part in graphs.PARTS}
            said = {part: export_graph(tokenizer, part, file, format=format) for part, file in files.items()}
            made[layout, format] = tokenizer, files, said
        return made[layout, format]

    return export


@pytest.mark.parametrize("layout, format", [
    ("1d", "onnx"), ("2d", "torch"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (("1d", "torch"), ("2d", "onnx"))),
])
def test_graphs_give_the_codes_and_images_of_the_model(layout, format, exported):
    """Of any number of images. torch.export: exactly; ONNX Runtime: the same codes, and pixels to 1e-4."""
    tokenizer, files, said = exported(layout, format)
    assert "100.00% of the codes" in said["encoder"] and "pixels differ by at most" in said["decoder"]
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    codes, pixels = run_alone(images, files["encoder"], files["decoder"])
    assert codes.dtype == torch.int64 and torch.equal(codes, tokenizer.encode(images))
    assert (pixels - tokenizer.decode(codes[:1])).abs().max() <= (0 if format == "torch" else 1e-4)


def test_a_graph_holds_the_weights_of_its_own_part_only(exported):
    tokenizer, files, _ = exported("2d", "torch")
    for part, others in (("encoder", "decoder"), ("decoder", "encoder")):
        held = torch.export.load(files[part]).state_dict
        elsewhere = [*getattr(tokenizer, others).parameters(), *getattr(tokenizer, f"cnn_{others}").parameters()]
        numbers = sum(parameter.numel() for parameter in tokenizer.parameters()) - sum(p.numel() for p in elsewhere)
        assert sum(tensor.numel() for name, tensor in held.items() if "codebook_used" not in name) <= numbers


@pytest.mark.parametrize("format, share", [("torch", "100.0%"), ("onnx", "99.9%")])
def test_one_code_in_ten_thousand_is_too_many_for_torch_and_one_in_five_hundred_for_onnx(format, share):
    expected = torch.arange(10_000)
    found = expected.clone()
    found[0] = -1
    if format == "onnx":
        assert graphs._compared("encoder", format, found, expected) == "99.99% of the codes are the model's"
        found[:20] = -1
    with pytest.raises(InputError, match=f"at least {share} are wanted"):
        graphs._compared("encoder", format, found, expected)


@pytest.mark.parametrize("wrong", [2e-4, float("nan")])
def test_pixels_that_differ_by_more_than_a_ten_thousandth_are_refused(wrong):
    expected = torch.zeros(1, 3, 4, 4)
    assert "9.0e-05" in graphs._compared("decoder", "onnx", expected + 9e-5, expected)
    with pytest.raises(InputError, match=r"0.0001 is allowed"):
        graphs._compared("decoder", "onnx", expected + wrong, expected)


def test_weights_too_many_for_an_onnx_file_are_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(graphs, "ONNX_BYTES", 1000)
    tokenizer = shallow_tokenizer()
    export_graph(tokenizer, "encoder", tmp_path / "e.onnx", format="onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.onnx", "e.onnx.data"]
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(run_alone(images, tmp_path / "e.onnx")[0], tokenizer.encode(images))


def test_what_computes_something_else_is_not_kept(tmp_path, monkeypatch):
    tokenizer = shallow_tokenizer()
    monkeypatch.setattr(graphs, "_of_the_model", lambda tokenizer, part, inputs: tokenizer.encode(inputs).flip(1))
    with pytest.raises(InputError, match=r"of the model's codes; at least 100.0% are wanted"):
        export_graph(tokenizer, "encoder", tmp_path / "e.pt2")
    assert list(tmp_path.iterdir()) == []


def test_as_a_command(tmp_path, capsys):
    tokenizer = shallow_tokenizer()
    save_standalone(tmp_path / "tok", tokenizer.config, tokenizer.state_dict())
    command = ["export-graph", str(tmp_path / "tok"), str(tmp_path / "d.pt2"), "--part", "decoder"]
    assert main(command) == 0 and "pixels differ by at most 0" in capsys.readouterr().out
    assert main(command) == 2 and "exists already" in capsys.readouterr().err


def test_without_onnx_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(InputError, match=r"pip install 'gigatok_ds.onnx.'"):
        export_graph(small_tokenizer(), "encoder", tmp_path / "e.onnx", format="onnx")
    assert list(tmp_path.iterdir()) == []
