"""The demo's figures: how well images are restored, codes are used, classes are drawn."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gigatok_ds import load_gpt, load_tokenizer
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.data.loader import evaluation_batches
from gigatok_ds.demo.figures import reconstruction_grid, sample_grid
from gigatok_ds.demo.workspace import Workspace
from gigatok_ds.evaluation.classifier import ImageClassifier
from gigatok_ds.evaluation.code_metrics import unigram_entropy
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.loss import stored_codes, validation_loss
from gigatok_ds.evaluation.probing.linear_probe import ProbeSettings
from gigatok_ds.evaluation.reconstruction_figures import evaluate_reconstruction
from gigatok_ds.files import write_atomically
from gigatok_ds.measurements.measure_probe import ProbedFeatures, measure_probe
from gigatok_ds.parallel.topology import single_process
from gigatok_ds.sampling.images import sample_images
from gigatok_ds.shards.index import ShardIndex

PER_CLASS = 20
# LARS moves weights by a thousandth of their size times the rate: few images need a larger one than ImageNet.
PROBE_EPOCHS, PROBE_BATCH, PROBE_LR = 30, 128, 40.0
SAMPLING: dict[str, Any] = {"cfg_scale": 2.0, "cfg_schedule": "constant", "temperature": 1.0, "top_k": 0, "top_p": 1.0}


def evaluate(demo: Workspace) -> dict[str, float]:
    """Compute every figure from the exported models, and write the pictures and metrics.json."""
    tokenizer, gpt = load_tokenizer(demo.exports["tokenizer"]), load_gpt(demo.exports["gpt"])
    size = tokenizer.config.image_size
    train_images, train_labels = load_images(demo.shards["train"], size)
    test_images, test_labels = load_images(demo.shards["validation"], size)

    alone = single_process()
    found = evaluate_reconstruction(tokenizer, CroppedImages(demo.shards["validation"], size), alone, batch_size=64)
    restored = tokenizer.decode(tokenizer.encode(test_images[:16]))
    reconstruction_grid(demo.out / "reconstructions.png", test_images[:16], restored,
                        found.values["psnr"][:16].tolist())

    classes = torch.arange(len(demo.source.classes)).repeat_interleave(PER_CLASS)
    drawn, samples = sample_images(gpt, tokenizer, classes, seed=0, batch_size=50, **SAMPLING)
    np.savez(demo.out / "samples.npz", classes=classes.numpy(), codes=drawn.numpy(),
             settings=json.dumps(SAMPLING | {"seed": 0}))
    grid = samples.view(len(demo.source.classes), PER_CLASS, 3, size, size)
    sample_grid(demo.out / "samples.png", grid, demo.source.classes)

    classifier = ImageClassifier.fit(train_images, train_labels, len(demo.source.classes))
    codes = CodeDataset.open(demo.codes["validation"])
    figures = {
        "psnr_db": found.figures["psnr"],
        "ssim": found.figures["ssim"],
        "codes_per_image": tokenizer.config.latent_tokens,
        "codebook_usage": found.figures["codebook_usage"],
        "codebook_perplexity": found.figures["codebook_perplexity"],
        "sample_accuracy": classifier.accuracy(samples.clamp(-1, 1), classes),
        "samples": len(classes),
        "classifier_test_accuracy": classifier.accuracy(test_images, test_labels),
        "gpt_validation_loss": validation_loss(gpt, stored_codes(codes, alone, 64), alone)["validation_loss"],
        "unigram_entropy": unigram_entropy(torch.as_tensor(codes.codes[:, 0].astype(np.int64)),
                                           tokenizer.config.quantizer.codebook_size),
        "probe_accuracy": probe_accuracy(demo),
    }
    write_atomically(demo.out / "metrics.json", (json.dumps(figures, indent=2) + "\n").encode())
    return figures


def probe_accuracy(demo: Workspace) -> float:
    """The test accuracy of a linear probe on the training images: a third of the published protocol's epochs."""
    train = ShardIndex.open(demo.shards["train"])
    settings = ProbeSettings(classes=len(demo.source.classes), epochs=PROBE_EPOCHS, warmup_epochs=PROBE_EPOCHS // 9,
                             base_lr=PROBE_LR, batch_size=min(PROBE_BATCH, len(train)),
                             flip=demo.tokenizer_recipe.data.flip)
    features = ProbedFeatures(tokenizer=demo.exports["tokenizer"], gpt=demo.exports["gpt"])
    results = measure_probe(features, str(demo.shards["train"]), str(demo.shards["validation"]), demo.out / "probe",
                            settings=settings)
    return results.figures["probe_top1_percent"] / 100


def load_images(shards, size: int) -> tuple[Tensor, Tensor]:
    """All images (N, 3, S, S) and labels (N,) of a small directory of shards."""
    images, labels = [], []
    for batch in evaluation_batches(ShardIndex.open(shards), size, 64):
        images.append(batch["images"][batch["valid"]])
        labels.append(batch["labels"][batch["valid"]])
    return torch.cat(images), torch.cat(labels)
