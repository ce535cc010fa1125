"""A GPT's validation loss."""

from __future__ import annotations

from pathlib import Path

from gigatok_ds.checkpoint.standalone import DTYPES, checkpoint_hash, load_gpt, load_tokenizer
from gigatok_ds.data.codes import CodeDataset
from gigatok_ds.evaluation.cropped import CroppedImages
from gigatok_ds.evaluation.loss import codes_of_images, stored_codes, validation_loss
from gigatok_ds.evaluation.results import Results, numeric_settings
from gigatok_ds.parallel.topology import Topology, single_process
from gigatok_ds.precision import float32_arithmetic
from gigatok_ds.shards.remote import short_name


@float32_arithmetic()
def measure_loss(gpt: Path, data: str, topology: Topology | None = None, *, tokenizer: Path | None = None,
                 dtype: str = "float32", orient: bool = False, batch_size: int = 32, workers: int = 0) -> Results:
    """Cross-entropy per code, in nats, on code shards or, through a standalone tokenizer, on images.

    gpt: a standalone checkpoint, loaded in `dtype`. orient: see `decode_image`. topology: as in
    `measure_reconstruction`. Raises InputError for what cannot be read, and for codes of another tokenizer.
    """
    topology = topology or single_process()
    network = load_gpt(gpt, device=str(topology.device), dtype=DTYPES[dtype])
    if tokenizer is None:
        dataset = CodeDataset.open(data).number_as(network.class_names, gpt)
        batches, origin = stored_codes(dataset, topology, batch_size), {"codes": dataset.metadata["provenance"]}
    else:
        encoder = load_tokenizer(tokenizer, device=str(topology.device))
        images = CroppedImages(data, encoder.config.image_size, orient=orient)
        images.number_as(network.class_names, gpt)
        batches = codes_of_images(encoder, images, topology, batch_size, workers=workers)
        origin = {"tokenizer_sha256": checkpoint_hash(tokenizer), "data_sha256": images.identity(),
                  "orient": orient}
    figures = validation_loss(network, batches, topology)
    settings = {"gpt": gpt.resolve().name, "gpt_sha256": checkpoint_hash(gpt), "data": short_name(data), **origin,
                "dtype": dtype, **numeric_settings(topology.device)}
    return Results(title=f"Validation loss of {gpt.resolve().name}", figures=figures, settings=settings)
