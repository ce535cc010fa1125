"""Validation loss of a standalone GPT: the mean cross-entropy of real images' codes, given their classes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.data.transforms import scale_pixels
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.tokenizer import Tokenizer
from gigatok_ds.parallel.topology import Topology

CodeBatches = Iterable[tuple[Tensor, Tensor]]


def codes_of_images(tokenizer: Tokenizer, images: CroppedImages, topology: Topology, batch_size: int, *,
                    workers: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's (codes (B, T), classes (B,)), encoded as they come."""
    for batch in images.batches(topology, batch_size, workers=workers):
        yield tokenizer.encode(scale_pixels(batch["pixels"].to(topology.device))), batch["labels"]


def stored_codes(dataset: CodeDataset, topology: Topology, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same of extracted codes; of several views of an image, the first."""
    for start in range(topology.rank * batch_size, len(dataset.codes), topology.world_size * batch_size):
        rows = slice(start, start + batch_size)
        codes, labels = dataset.codes[rows, 0], dataset.labels[rows]
        yield torch.as_tensor(codes.astype("int64")), torch.as_tensor(labels.astype("int64"))


@torch.no_grad()
def validation_loss(gpt: GPT, batches: CodeBatches, topology: Topology) -> dict[str, float]:
    """`validation_loss` in nats per code, with teacher forcing and the true classes, and `sequences`; collective.

    The mean is over codes, whatever the batches: the original's is one over batches, of which the last may be smaller.
    """
    device = gpt.norm.weight.device
    total = torch.zeros(3, dtype=torch.float64, device=device)
    for codes, classes in tqdm(batches, desc="loss", unit="batch", disable=None if topology.is_first else True):
        codes, classes = codes.to(device), classes.to(device)
        gpt.check_classes(classes)
        if int(codes.max()) >= gpt.config.vocab_size or codes.shape[1] != gpt.config.sequence_length:
            raise InputError(
                f"codes up to {int(codes.max())}, {codes.shape[1]} an image, do not fit the GPT, which has "
                f"{gpt.config.vocab_size} codes and sequences of {gpt.config.sequence_length}"
            )
        losses = gpt(codes[:, :-1], classes, codes).double()
        total += torch.stack([losses.sum(), losses.new_tensor(losses.numel()), losses.new_tensor(len(codes))])
    total = topology.sum_over_ranks(total)
    if not total[2]:
        raise InputError("there are no sequences to measure the loss of")
    return {"validation_loss": float(total[0] / total[1]), "sequences": int(total[2])}
