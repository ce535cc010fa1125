"""One rank, for what needs no process group."""

import torch

from gigatok_ds.parallel.topology import Topology

ALONE = Topology(rank=0, world_size=1, device=torch.device("cpu"), data_rank=0, data_size=1)
