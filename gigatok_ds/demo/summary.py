"""The demo's figures against their targets, its curves and its report."""

from __future__ import annotations

import json
import sys

from gigatok_ds.config.load import recipe_to_dict
from gigatok_ds.demo.demo_report import Figure, ReportContent, Section, write_report
from gigatok_ds.demo.figures import loss_curves
from gigatok_ds.demo.workspace import Workspace
from gigatok_ds.monitoring.metrics import read_metrics
from gigatok_ds.training.environment import anonymise

CURVES = ["loss", "loss/reconstruction", "loss/commitment", "loss/entropy", "loss/adversarial",
          "discriminator/discriminator", "codebook_usage", "validation/psnr", "validation/loss"]

FILES = [
    ("report.html", "this page"),
    ("metrics.json", "the figures above"),
    ("verify.json", "differences between the exports and the models that were trained"),
    ("demo.json", "data and recipes of this run"),
    ("reconstructions.png", "test images and their reconstructions"),
    ("samples.png", "generated images, a row for each class"),
    ("loss_curves.png", "losses of both training runs"),
    ("samples.npz", "codes and classes of the samples"),
    ("probe/", "the linear probe on the GPT's features"),
    ("data/", "image shards: train and test"),
    ("codes/", "code shards: train and test"),
    ("tokenizer/", "training run: recipe, DeepSpeed settings, environment, metrics, events, checkpoints"),
    ("gpt/", "training run: the same files"),
    ("export/tokenizer/", "standalone tokenizer: config.json and model.safetensors"),
    ("export/gpt/", "standalone GPT"),
]


def figures_with_targets(values: dict[str, float], *, has_targets: bool) -> list[Figure]:
    """The report's table; targets are judged only where they were published for the data."""

    def figure(name: str, key: str, unit: str, explanation: str, target: str | None = None,
               passed: bool | None = None) -> Figure:
        judged = has_targets and target is not None
        return Figure(name=name, value=values[key], unit=unit, explanation=explanation,
                      target=target if judged else None, passed=passed if judged else None)

    return [
        figure("Reconstruction PSNR", "psnr_db", "dB", "mean over the test images",
               "at least 20", values["psnr_db"] >= 20),
        figure("Reconstruction SSIM", "ssim", "", "mean over the test images, as the original computes it"),
        figure("Codes per image", "codes_per_image", "", "latent tokens", "at most 16",
               values["codes_per_image"] <= 16),
        figure("Codebook usage", "codebook_usage", "", "share of the codebook that the test images use",
               "at least 0.5", values["codebook_usage"] >= 0.5),
        figure("Codebook perplexity", "codebook_perplexity", "", "exp of the entropy of the test images' codes"),
        figure("Samples classified as asked", "sample_accuracy", "", f"of {values['samples']} samples, 20 per class",
               "at least 0.85", values["sample_accuracy"] >= 0.85),
        figure("The classifier on real test images", "classifier_test_accuracy", "",
               "a support vector machine trained on the real training images only",
               "at least 0.95", values["classifier_test_accuracy"] >= 0.95),
        figure("GPT validation loss", "gpt_validation_loss", "nats per code", "on codes of the test images",
               "below the unigram entropy", values["gpt_validation_loss"] < values["unigram_entropy"]),
        figure("Linear probe on the GPT's features", "probe_accuracy", "",
               "of the test images, by a linear layer on the "
               "middle block's mean", "at least 0.9", values["probe_accuracy"] >= 0.9),
        figure("Unigram entropy", "unigram_entropy", "nats per code",
               "of the same codes: what counting alone achieves"),
    ]


def summarise(demo: Workspace, values: dict[str, float], seconds: float) -> list[Figure]:
    """Draw the curves, write report.html and return its table of figures."""
    phases = {kind: read_metrics(demo.out / kind) for kind in ("tokenizer", "gpt")}
    loss_curves(demo.out / "loss_curves.png", phases, CURVES)
    environment = json.loads((demo.out / "tokenizer" / "environment.json").read_text())
    figures = figures_with_targets(values, has_targets=demo.source.has_targets)
    write_report(demo.out / "report.html", ReportContent(
        title="gigatok_ds demo",
        subtitle="A tokenizer and a GPT, trained, sampled, exported and checked",
        facts=[
            ("Data", demo.source.description),
            ("Command", "gigatok-ds " + " ".join(map(anonymise, sys.argv[1:]))),
            ("Recipes", ", ".join(recipe.name for recipe in demo.recipes.values())),
            ("Ranks and ZeRO stage", f"{demo.options.ranks}, {demo.options.stage}"),
            ("Time of this command", f"{seconds / 60:.1f} minutes"),
        ],
        figures=figures,
        images=[
            ("Test images, each above its reconstruction", demo.out / "reconstructions.png"),
            ("Generated images; a row for each class", demo.out / "samples.png"),
            ("Losses over training steps", demo.out / "loss_curves.png"),
        ],
        sections=[
            Section(title="Exports against the trained models",
                    values=json.loads((demo.out / "verify.json").read_text()), open=True),
            Section(title="Tokenizer recipe", values=recipe_to_dict(demo.recipes["tokenizer"])),
            Section(title="GPT recipe", values=recipe_to_dict(demo.recipes["gpt"])),
            Section(title="DeepSpeed settings",
                    values=json.loads((demo.out / "tokenizer" / "deepspeed.json").read_text())),
            Section(title="Environment", values=environment),
        ],
        files=FILES,
        tokenizer_export="export/tokenizer",
        gpt_export="export/gpt",
    ))
    return figures
