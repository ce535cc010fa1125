"""Tokenizers as graphs for other runtimes: `torch.export` programs (.pt2) and ONNX files.

Two graphs: the encoder, images (B, 3, S, S) to codes (B, T), and the decoder, codes to images; B is free. Each holds
the weights of its part, needs nothing of gigatok_ds, and finds the nearest code by a matrix product instead of this
package's kernels.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gigatok_ds.errors import InputError
from gigatok_ds.files import sync
from gigatok_ds.models.tokenizer import Tokenizer

PARTS = ("encoder", "decoder")
SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
# How many of a graph's codes must be those of the model, and how close its pixels must be to the model's.
CODES_EQUAL = {"torch": 1.0, "onnx": 0.999}
PIXELS = 1e-4
ONNX_BYTES = 1.5e9  # the format's limit is 2 GiB; larger weights get a file of their own


class EncoderGraph(nn.Module):
    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.latent = nn.Sequential(tokenizer.cnn_encoder, tokenizer.encoder, tokenizer.quant_conv)
        self.quantizer = tokenizer.quantizer

    def forward(self, images: Tensor) -> Tensor:
        latents = self.latent(images).permute(0, 2, 3, 1).flatten(1, 2)
        codebook = self.quantizer.codebook()
        latents = F.normalize(latents, dim=-1) if self.quantizer.config.l2_normalized else latents
        # |z - e|^2 = |z|^2 - 2 (z.e - |e|^2 / 2): the first term is the same for all codes.
        codes: Tensor = (latents @ codebook.T - 0.5 * codebook.square().sum(1)).argmax(-1)
        return codes


class DecoderGraph(nn.Module):
    def __init__(self, tokenizer: Tokenizer):
        super().__init__()
        self.quantizer, self.post_quant_conv = tokenizer.quantizer, tokenizer.post_quant_conv
        self.decoder, self.cnn_decoder = tokenizer.decoder, tokenizer.cnn_decoder

    def forward(self, codes: Tensor) -> Tensor:
        latent = self.quantizer.codebook()[codes].permute(0, 2, 1).unsqueeze(2)
        images: Tensor = self.cnn_decoder(self.decoder(self.post_quant_conv(latent))[0])
        return images


def export_graph(tokenizer: Tokenizer, part: str, out: Path, *, format: str = "torch") -> str:
    """Write one part as one file, check it against the model on images it has not seen, and say how near it is.

    The tokenizer is in float32 on the CPU. Raises InputError when `out` exists, when ONNX's packages are missing, or
    when the graph computes something else; `out` is whole or absent. Weights of a large ONNX graph are in `out`.data.
    """
    for path in (out, _data_file(out)):
        if path.exists():
            raise InputError(f"{path} exists already; choose another file or remove it")
    graph = {"encoder": EncoderGraph, "decoder": DecoderGraph}[part](tokenizer).eval()
    sample, other = _example(tokenizer, part, 2), _example(tokenizer, part, 3)
    write, run = {"torch": (_write_torch, _run_torch), "onnx": (_write_onnx, _run_onnx)}[format]
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        file = scratch / out.name
        write(graph, sample, "images" if part == "encoder" else "codes", file)
        said = _compared(part, format, run(file, other), _of_the_model(tokenizer, part, other))
        for written in (_data_file(file), file):
            if written.exists():
                sync(written)
                written.replace(out.with_name(written.name))
        return said
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _data_file(file: Path) -> Path:
    """Where an ONNX file keeps its weights, if they are too many for itself."""
    return file.with_name(file.name + ".data")


def _example(tokenizer: Tokenizer, part: str, batch: int) -> Tensor:
    draw, config = torch.Generator().manual_seed(batch), tokenizer.config
    if part == "encoder":
        return torch.rand(batch, 3, config.image_size, config.image_size, generator=draw) * 2 - 1
    return torch.randint(config.quantizer.codebook_size, (batch, config.latent_tokens), generator=draw)


def _of_the_model(tokenizer: Tokenizer, part: str, inputs: Tensor) -> Tensor:
    return tokenizer.encode(inputs) if part == "encoder" else tokenizer.decode(inputs)


def _compared(part: str, format: str, found: Tensor, expected: Tensor) -> str:
    if part == "encoder":
        equal, least = (found == expected).double().mean().item(), CODES_EQUAL[format]
        if equal < least:
            raise InputError(f"the graph gives {equal:.2%} of the model's codes; at least {least:.1%} are wanted")
        return f"{equal:.2%} of the codes are the model's"
    difference = (found - expected).abs().max().item()
    if not difference <= PIXELS:
        raise InputError(f"the graph's pixels differ by up to {difference:.2g} from the model's; {PIXELS} is allowed")
    return f"pixels differ by at most {difference:.1e} from the model's"


def _exported(graph: nn.Module, sample: Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(graph, (sample,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False)


def _write_torch(graph: nn.Module, sample: Tensor, name: str, file: Path) -> None:
    with torch.no_grad():
        torch.export.save(_exported(graph, sample), file)


def _run_torch(file: Path, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        outputs: Tensor = torch.export.load(file).module()(inputs)
        return outputs


def _write_onnx(graph: nn.Module, sample: Tensor, name: str, file: Path) -> None:
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"ONNX needs what cannot be imported ({error}); pip install 'gigatok_ds[onnx]'") from error
    with torch.no_grad():
        program = torch.onnx.export(_exported(graph, sample), (sample,), dynamo=True, verbose=False,
                                    input_names=[name], output_names=["codes" if name == "images" else "images"])
        assert program is not None  # as it may be without dynamo
        size = sum(parameter.nbytes for parameter in graph.parameters())
        program.save(file, external_data=size > ONNX_BYTES)


def _run_onnx(file: Path, inputs: Tensor) -> Tensor:
    import onnxruntime

    onnxruntime.disable_telemetry_events()
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])
