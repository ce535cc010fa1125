"""Export the newest checkpoint of a training run as a standalone checkpoint.

The result is a directory with config.json and model.safetensors, which gigatok_ds.load_tokenizer and
gigatok_ds.load_gpt read without DeepSpeed or Megatron.
"""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "training run -> standalone checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dir", type=Path, help="directory of a training run")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="standalone checkpoint to write")
    parser.add_argument("--weights", choices=("ema", "model"),
                        help="the moving average, or the weights themselves (default: ema where the run kept one)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.training.export import export_run

    print(f"wrote {export_run(args.run_dir, args.out, choice=args.weights)}")
    return 0
