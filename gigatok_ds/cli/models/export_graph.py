"""Write a tokenizer's encoder or decoder as a graph: a torch.export program or an ONNX file.

  gigatok-ds export-graph checkpoints/tokenizer-ss encoder.pt2 --part encoder
  gigatok-ds export-graph checkpoints/tokenizer-ss decoder.onnx --part decoder --format onnx

The graph takes any number of images (batch, 3, size, size) in [-1, 1] or of codes (batch, latent tokens), in float32,
and needs nothing of gigatok_ds. It is run once on other inputs and compared with the model before it is kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "tokenizer -> torch.export program or ONNX"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="standalone tokenizer")
    parser.add_argument("out", type=Path, metavar="FILE", help="file to write")
    parser.add_argument("--part", choices=("encoder", "decoder"), required=True,
                        help="images to codes, or codes to images")
    parser.add_argument("--format", choices=("torch", "onnx"), default="torch",
                        help="torch: a .pt2 for torch.export.load (default); onnx: needs pip install "
                             "'gigatok_ds[onnx]'")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.checkpoint.graphs import export_graph
    from gigatok_ds.checkpoint.standalone import load_tokenizer

    said = export_graph(load_tokenizer(args.checkpoint), args.part, args.out, format=args.format)
    print(f"wrote {args.out}: {said}")
    return 0
