"""Serve a local page of trained models, until Ctrl-C: an image's reconstruction and codes, what its first codes give,
codes exchanged between two images; and, with a GPT, samples of classes.

  gigatok-ds app runs/demo/export
  gigatok-ds app checkpoints/tokenizer-ss checkpoints/gpt-b --device cuda

CHECKPOINTS are standalone models, or directories with standalone models in them: all together one tokenizer and at most
one GPT. The page is served to this machine only; over ssh, forward the port: ssh -L 7860:127.0.0.1:7860 HOST.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "a local page: an image's codes, exchanged and left out; samples"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINTS",
                        help="standalone tokenizer and, for samples, GPT; or a directory that holds them")
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="text file with a class name a line, in the order of the classes (default: what the GPT calls "
        "them, or their numbers)",
    )
    parser.add_argument("--host", default="127.0.0.1",
                        help="address to listen on; another than this machine's own has no password (default: "
                             "127.0.0.1)")
    parser.add_argument("--port", type=int, default=7860, help="default: 7860")
    parser.add_argument("--max-megabytes", type=float, default=20, metavar="N",
                        help="of an uploaded file (default: 20)")
    parser.add_argument("--max-total-megabytes", type=float, default=1000, metavar="N",
                        help="of all uploads and pictures that are kept at a time, for an hour (default: 1000)")
    parser.add_argument("--max-megapixels", type=float, default=50, metavar="N",
                        help="of an uploaded image (default: 50)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.app.models import open_models
    from gigatok_ds.app.server import serve
    from gigatok_ds.app.uploads import Limits

    limits = Limits(megabytes=args.max_megabytes, megapixels=args.max_megapixels,
                    total_megabytes=args.max_total_megabytes)
    serve(open_models(args.checkpoints, device=args.device, class_names=args.class_names), limits, host=args.host,
          port=args.port)
    return 0
