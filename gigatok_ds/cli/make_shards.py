"""gigatok-ds make-shards: a directory of images becomes a directory of tar shards."""

from __future__ import annotations

import argparse

HELP = "pack a directory of images (one sub-directory per class) into WebDataset tar shards with an index"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR",
                        help="one sub-directory per class, or images of a single class")
    parser.add_argument("--out", required=True, metavar="OUT",
                        help="directory to create; may exist if it is empty")
    parser.add_argument("--prefix", default="images",
                        help="shards are named PREFIX-000000.tar, ... (default: images)")
    parser.add_argument("--samples-per-shard", type=int, default=1000, metavar="N", help="default: 1000")


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from gigatok_ds.data.folder import scan_image_folder
    from gigatok_ds.data.index import safe_key
    from gigatok_ds.data.shards import Sample, write_shards

    folder = scan_image_folder(args.directory)

    def samples():
        for number, (path, label) in enumerate(zip(folder.paths, folder.labels, strict=True)):
            # The number keeps keys unique; the (shortened) name lets a person find the file again.
            yield Sample(key=f"{number:08d}_{safe_key(path.stem)[:20]}", image_bytes=path.read_bytes(),
                         extension=path.suffix[1:], label=label, source=str(path))

    written = write_shards(samples(), Path(args.out), prefix=args.prefix,
                           samples_per_shard=args.samples_per_shard, classes=folder.classes,
                           total=len(folder.paths))
    size = sum(shard.size for shard in written.shards)
    print(f"wrote {written.count} images of {len(folder.classes)} classes in {len(written.shards)} shards "
          f"({size / 1e6:.1f} MB) to {written.directory}")
    return 0
