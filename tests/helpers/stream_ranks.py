"""One rank of several that read images, as a training run would: a step ends when all ranks have read their share.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=... MASTER_PORT=... python stream_ranks.py SHARDS OUT WORKERS STEPS

OUT/samples.txt says how many samples all ranks together have consumed; OUT/rank-R.txt has a line for each sample that
this rank has read: position, key, label and CRC-32 of the pixels.
"""

import os
import sys
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from gigatok_ds.cluster.share import Share
from gigatok_ds.data.decoding import training_transform
from gigatok_ds.data.loader import ImageBatches
from gigatok_ds.data.reader import ReadingPlan
from gigatok_ds.files import write_atomically
from gigatok_ds.shards.index import ShardIndex

GLOBAL_BATCH, MICRO_BATCH, SIZE, SEED = 8, 1, 16, 5


def image_batches(shards, workers=0, **arguments):
    plan = ReadingPlan(global_batch_size=GLOBAL_BATCH, **arguments)
    return ImageBatches(ShardIndex.open(shards), training_transform(SIZE), plan, seed=SEED, shuffle_shards=2,
                        workers=workers)


def lines(index, batch):
    for place, image in enumerate(batch["images"]):
        position, sample, label = (int(batch[name][place]) for name in ("position", "sample", "labels"))
        yield f"{position} {index.key(sample)} {label} {zlib.crc32(image.numpy().tobytes())}"


def main(shards, out, workers, steps):
    dist.init_process_group("gloo")
    consumed = out / "samples.txt"
    start = int(consumed.read_text()) // GLOBAL_BATCH if consumed.exists() else 0
    index = ShardIndex.open(shards)
    loader = image_batches(shards, micro_batch_size=MICRO_BATCH, workers=workers, start_step=start,
                           share=Share(rank=dist.get_rank(), size=dist.get_world_size()))
    batches = iter(loader)
    with open(out / f"rank-{dist.get_rank()}.txt", "a") as log:
        for step in range(start, start + steps):
            for _ in range(loader.micro_steps):
                log.writelines(line + "\n" for line in lines(index, next(batches)))
            log.flush()
            dist.all_reduce(torch.zeros(1))
            if dist.get_rank() == 0:
                write_atomically(consumed, str((step + 1) * GLOBAL_BATCH).encode())
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
