"""A linear probe's accuracy."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from gigatok_ds.checkpoint.standalone import checkpoint_hash, load_gpt, load_tokenizer
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.probing.features import GPTFeatures, TokenizerFeatures
from gigatok_ds.evaluation.probing.linear_probe import ProbeRun, ProbeSettings
from gigatok_ds.evaluation.results import Results, numeric_settings
from gigatok_ds.parallel.topology import Topology, single_process
from gigatok_ds.precision import float32_arithmetic
from gigatok_ds.sampling.images import check_pair
from gigatok_ds.shards.remote import open_shards


@dataclass(frozen=True, kw_only=True)
class ProbedFeatures:
    """Which features of which standalone models: a tokenizer's own, or a GPT's residual stream after block `depth`
    (None: the middle one) of its codes.
    """

    tokenizer: Path
    of_tokenizer: Literal["encoder", "cnn", "decoder"] = "encoder"
    gpt: Path | None = None
    depth: int | None = None
    dropout: bool = True  # of the GPT in training, as the original leaves it

    def load(self, topology: Topology) -> TokenizerFeatures | GPTFeatures:
        """Raises InputError for models that do not fit each other."""
        tokenizer = load_tokenizer(self.tokenizer, device=str(topology.device))
        if self.gpt is None:
            return TokenizerFeatures(tokenizer, self.of_tokenizer)
        gpt = load_gpt(self.gpt, device=str(topology.device))
        check_pair(gpt, tokenizer)
        return GPTFeatures(tokenizer, gpt, depth=self.depth, dropout=self.dropout)

    def identity(self) -> dict[str, str]:
        """What tells the models from others."""
        hashes = {"tokenizer_sha256": checkpoint_hash(self.tokenizer)}
        return hashes if self.gpt is None else hashes | {"gpt_sha256": checkpoint_hash(self.gpt)}


@float32_arithmetic()
def measure_probe(of: ProbedFeatures, train: str, val: str, out: Path, topology: Topology | None = None, *,
                  settings: ProbeSettings, workers: int = 0) -> Results:
    """Top-1 accuracy, in percent, of a linear classifier of frozen features, trained as far as it is not yet.

    train, val: images with labels, as shards; `val` may be a directory. out: where the probe is kept while it trains.
    topology: as in `measure_reconstruction`. Raises InputError for settings and models that do not fit, and for data
    without labels.
    """
    topology = topology or single_process()
    features = of.load(topology)
    images, test = open_shards(train), CroppedImages(val, features.tokenizer.config.image_size,
                                                     orient=settings.orient)
    test.number_as(images.classes, train)
    if not settings.classes:
        settings = replace(settings, classes=images.count_classes())
    identity = of.identity() | {"train_sha256": images.identity()}
    run = ProbeRun(features, images, settings, topology, out, identity=identity, workers=workers)
    run.run()
    top1 = 100 * run.accuracy(test, max(settings.batch_size // topology.world_size, 1))
    said = {**identity, **features.describe(), **asdict(settings), "val_sha256": test.identity(),
            "train_images": len(images), "val_images": len(test), **numeric_settings(topology.device)}
    return Results(title=f"Linear probe of {(of.gpt or of.tokenizer).resolve().name}",
                   figures={"probe_top1_percent": top1}, settings=said)
