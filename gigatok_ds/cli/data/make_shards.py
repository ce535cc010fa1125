"""Pack images into WebDataset tar shards (KEY.jpg, KEY.cls, KEY.txt) with an index.

  gigatok-ds make-shards imagenet/train --out shards/train --prefix imagenet-train
  gigatok-ds make-shards ILSVRC2012_img_train.tar --out shards/train --prefix imagenet-train
  gigatok-ds make-shards ILSVRC2012_img_val.tar --labels ILSVRC2012_devkit_t12.tar.gz --out shards/val
  gigatok-ds make-shards cc12m --out shards/cc12m --prefix cc12m

SOURCE is a directory with one sub-directory per class, one of ImageNet's tars, which is not unpacked, a directory of
its nNNNNNNNN.tar files, a directory of shards, which are packed anew with their captions (KEY.txt), Parquet files as
Hugging Face's datasets have them, MosaicML's MDS shards, litdata's chunks, or a text file (.txt, .lst) with the path of
an image in each line. Images without classes get them from --labels or --label-field; a tokenizer needs none
(--no-labels). Class names that are whole numbers are the labels. Image files are stored as they are, unless --resize
shrinks them. The same images and settings give the same bytes. Interrupted, the same command goes on where it was;
until all is written, it lies in OUT.partial.
"""

from __future__ import annotations

import argparse
import logging

logger = logging.getLogger(__name__)

HELP = "images (folders, ImageNet's tars, other shards) -> WebDataset tar shards with an index"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="directory, tar, Parquet file or list of images")
    parser.add_argument("--out", required=True, metavar="OUT", help="directory to create; may exist if it is empty")
    parser.add_argument("--prefix", default="images", help="shards are named PREFIX-000000.tar, ... (default: images)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="classes of images that do not say theirs: ImageNet's devkit (ILSVRC2012_devkit_t12.tar.gz), Kaggle's "
        "LOC_val_solution.csv, a text file with a line NAME CLASS for each image, or a CSV or Parquet table",
    )
    parser.add_argument("--label-field", metavar="NAME", help="the column of classes in such a table or in SOURCE's "
                        "Parquet, MDS or litdata files (default: label or class), or a field of each sample's KEY.json "
                        "in shards")
    parser.add_argument("--no-labels", action="store_true", help="pack the images at any depth, without classes")
    parser.add_argument("--resize", type=int, metavar="N",
                        help="shrink larger images to a shorter side of N pixels and store them as JPEG")
    parser.add_argument("--quality", type=int, metavar="Q", help="of these JPEG files (default: 95)")
    parser.add_argument("--shuffle-seed", type=int, metavar="SEED",
                        help="store images in a random order, for readers that only stream; training needs none")
    parser.add_argument("--metadata", action="store_true", help="also store KEY.json: class, size, where it came from")
    parser.add_argument("--skip-bad", action="store_true",
                        help="leave undecodable images out and list them in skipped.json, instead of ending")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: the number of cores)")


def run(args: argparse.Namespace) -> int:
    from gigatok_ds.errors import InputError
    from gigatok_ds.packing.image_sources import open_source
    from gigatok_ds.packing.pack_shards import Packing, pack
    from gigatok_ds.packing.workers import worker_count
    from gigatok_ds.shards.tar_scan import NO_LABEL, in_words

    if args.quality is not None and args.resize is None:
        raise InputError("--quality goes with --resize; without it images are stored as they are")
    packing = Packing(prefix=args.prefix, samples_per_shard=args.samples_per_shard, resize=args.resize,
                      quality=Packing.quality if args.quality is None else args.quality, shuffle_seed=args.shuffle_seed,
                      metadata=args.metadata, skip_bad=args.skip_bad)
    workers = worker_count(args.workers)
    source = open_source(args.source, args.labels, field=args.label_field, unlabelled=args.no_labels)
    written = pack(source, args.out, packing, workers=workers)
    size = sum(shard.size for shard in written.shards)
    classes = f"of {len({image.label for image in source.images}) if source.classes else 'unnamed'} classes"
    print(f"wrote {written.count} images {classes if source.has_labels else 'without labels'} in "
          f"{len(written.shards)} shards ({size / 1e6:.1f} MB) to {written.directory}")
    if source.has_labels and (lacking := sum(image.label == NO_LABEL for image in source.images)):
        logger.warning("%d of these images have no label; only tokenizers do without", lacking)
    for note in source.notes:
        logger.warning("%s", note)
    if source.left_out:
        print(f"left out {source.left_out.total()} other files: {in_words(source.left_out)}")
    if written.count < len(source.images):
        print(f"left out {len(source.images) - written.count} undecodable images, listed in skipped.json")
    return 0
