"""The demo's figures: how well images are restored, codes are used, classes are drawn."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gigatok_ds import load_gpt, load_tokenizer
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.data.index import ShardIndex
from gigatok_ds.data.loader import evaluation_batches
from gigatok_ds.demo.figures import reconstruction_grid, sample_grid
from gigatok_ds.evaluation.classifier import ImageClassifier
from gigatok_ds.evaluation.code_metrics import codebook_usage, perplexity, unigram_entropy
from gigatok_ds.evaluation.image_metrics import psnr
from gigatok_ds.sampling.images import sample_images
from gigatok_ds.training.monitor import read_metrics

if TYPE_CHECKING:
    from gigatok_ds.demo.pipeline import Demo

PER_CLASS = 20
SAMPLING = {"cfg_scale": 2.0, "cfg_schedule": "constant", "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def evaluate(demo: Demo) -> dict[str, float]:
    """Compute every figure from the exported models, and write the pictures and metrics.json."""
    tokenizer, gpt = load_tokenizer(demo.exports["tokenizer"]), load_gpt(demo.exports["gpt"])
    size = tokenizer.config.image_size
    train_images, train_labels = load_images(demo.shards["train"], size)
    test_images, test_labels = load_images(demo.shards["validation"], size)

    codes = torch.cat([tokenizer.encode(batch) for batch in test_images.split(64)])
    restored = torch.cat([tokenizer.decode(batch) for batch in codes.split(64)])
    values = psnr(test_images, restored)
    reconstruction_grid(demo.out / "reconstructions.png", test_images[:16], restored[:16], values[:16].tolist())

    classes = torch.arange(len(demo.source.classes)).repeat_interleave(PER_CLASS)
    drawn, samples = sample_images(gpt, tokenizer, classes, seed=0, batch_size=50, **SAMPLING)
    np.savez(demo.out / "samples.npz", classes=classes.numpy(), codes=drawn.numpy(),
             settings=json.dumps(SAMPLING | {"seed": 0}))
    grid = samples.view(len(demo.source.classes), PER_CLASS, 3, size, size)
    sample_grid(demo.out / "samples.png", grid, demo.source.classes)

    classifier = ImageClassifier.fit(train_images, train_labels, len(demo.source.classes))
    codebook = tokenizer.config.quantizer.codebook_size
    validation_codes = torch.as_tensor(CodeDataset.open(demo.codes["validation"]).codes[:, 0].astype(np.int64))
    figures = {
        "psnr_db": float(values.mean()),
        "codes_per_image": tokenizer.config.latent_tokens,
        "codebook_usage": codebook_usage(codes, codebook),
        "codebook_perplexity": perplexity(codes, codebook),
        "sample_accuracy": classifier.accuracy(samples.clamp(-1, 1), classes),
        "samples": len(classes),
        "classifier_test_accuracy": classifier.accuracy(test_images, test_labels),
        "gpt_validation_loss": last_value(read_metrics(demo.out / "gpt"), "validation/loss"),
        "unigram_entropy": unigram_entropy(validation_codes, codebook),
    }
    scratch = demo.out / "metrics.partial"
    scratch.write_text(json.dumps(figures, indent=2) + "\n")
    os.replace(scratch, demo.out / "metrics.json")
    return figures


def load_images(shards, size: int) -> tuple[Tensor, Tensor]:
    """All images (N, 3, S, S) and labels (N,) of a small directory of shards."""
    images, labels = [], []
    for batch in evaluation_batches(ShardIndex.open(shards), size, 64):
        images.append(batch["images"][batch["valid"]])
        labels.append(batch["labels"][batch["valid"]])
    return torch.cat(images), torch.cat(labels)


def last_value(metrics: list[dict], name: str) -> float:
    return next(line[name] for line in reversed(metrics) if name in line)
