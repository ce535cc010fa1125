"""Tiny training runs in processes of their own, one rank or several."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from places import ROOT
from rank_runs import run_main

from gigatok_ds.cluster.local_job import free_port
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.data.codes import CodeSample, write_code_shards
from gigatok_ds.packing.shard_writer import Sample, write_shards
from gigatok_ds.resilience.fault_injection import parse_fault
from gigatok_ds.training.run import run_training

LAUNCHER = ROOT / "launch" / "train.sh"

TOKENIZER = """
kind: tokenizer
name: tiny_tokenizer
model:
  layout: 1d
  image_size: 16
  encoder: {width: 32, layers: 1, heads: 2}
  decoder: {width: 32, layers: 1, heads: 2}
  latent_tokens: 8
  z_channels: 32
  cnn: {base_channels: 32, encoder_multipliers: [1, 1], decoder_multipliers: [1, 1], residual_blocks: 1}
  quantizer: {codebook_size: 64, codebook_dim: 4}
  semantic_head: null
loss:
  perceptual: null
  quantizer: {entropy: 0.01, entropy_end_step: 7}
  adversarial: {start_step: 4, weight: 0.1, base_channels: 8, layers: 1}
  auxiliary: {end_step: 6}
  semantic: null
# A large epsilon, because Adam turns the rounding noise of gradients that are truly zero into steps of full size.
optimizer: {lr: 1e-3, eps: 1e-3}
schedule: {warmup_steps: 2}
training: {steps: 8, global_batch_size: 8, precision: fp32, log_every: 1, validate_every: 4}
checkpoint: {every: 4}
data: {workers: 0}
"""

GPT = """
kind: gpt
name: tiny_gpt
model: {size: {width: 32, layers: 2, heads: 2}, vocab_size: 64, sequence_length: 8, num_classes: 5}
optimizer: {lr: 3e-3, weight_decay: 0.05, decay: matrices, max_grad_norm: 1.0}
training: {steps: 8, global_batch_size: 8, precision: fp32, log_every: 1, validate_every: 4}
checkpoint: {every: 4}
"""


def image_shards(folder, count, **how):
    """Shards of coloured stripes: an image that a tokenizer can learn something about."""

    def samples():
        for number in range(count):
            rng = np.random.default_rng(number)
            pixels = np.tile(rng.integers(0, 256, (1, 20, 3), dtype=np.uint8), (20, 1, 1))
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="png")
            yield Sample(key=f"s{number}", image_bytes=buffer.getvalue(), extension="png", label=number % 5)

    write_shards(samples(), folder, prefix="stripes", classes=list("abcde"), **how)


def code_shards(folder, count, seed, tokens=8):
    rng = np.random.default_rng(seed)
    samples = (CodeSample(key=f"k{i}", codes=rng.integers(0, 10, (2, tokens)) + 10 * (i % 5), label=i % 5)
               for i in range(count))
    write_code_shards(samples, folder, codebook_size=64, latent_tokens=tokens, provenance={})


def prepare(folder):
    """Recipes and data of both kinds below `folder`; returns the arguments that name the data."""
    (folder / "tokenizer.yaml").write_text(TOKENIZER)
    (folder / "gpt.yaml").write_text(GPT)
    image_shards(folder / "images", 40)
    image_shards(folder / "test_images", 11)
    code_shards(folder / "codes", 40, seed=0)
    code_shards(folder / "test_codes", 11, seed=1)
    return {
        "tokenizer": [f"data.train={folder / 'images'}", f"data.validation={folder / 'test_images'}"],
        "gpt": [f"data.train={folder / 'codes'}", f"data.validation={folder / 'test_codes'}"],
    }


def forget_shared_memory(worker):
    """Remove what a data worker that was killed left in /dev/shm: torch names a tensor's memory for a moment, and
    SIGKILL in that moment leaves the name."""
    for path in Path("/dev/shm").glob(f"torch_{worker}_*"):
        path.unlink()


def partitioning(stage):
    """DeepSpeed's settings. At stage 3 parameters as small as these would stay whole, and nothing of ZeRO-3 would be
    tested: here all are partitioned, and released after each use."""
    settings = zero_settings(stage)
    if stage == 3:
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}
    return settings


def train_with_faults(recipe, out, stage, faults):
    """Train on the ranks that `rank_runs` has started, while faults happen."""
    run_training(recipe, out, zero_settings(stage), faults=[parse_fault(text) for text in faults])


def start(arguments, ranks=1):
    """Run `gigatok-ds train ...` on forked ranks; returns (exit code, everything it printed)."""
    return run_main(["train", *arguments], ranks)


def launch(arguments, ranks):
    """`gigatok-ds train ...` as a user starts it, by launch/train.sh for several ranks: a Popen whose output is text.
    """
    command = [sys.executable, "-m", "gigatok_ds", "train"] if ranks == 1 else ["bash", str(LAUNCHER)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GPUS": str(ranks), "MASTER_PORT": str(free_port()),
                                "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return subprocess.Popen([*command, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, env=environment)
