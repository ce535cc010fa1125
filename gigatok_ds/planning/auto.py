"""The recommended layout for the GPUs that a job finds itself on."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from gigatok_ds.cluster.launched import launched_rank
from gigatok_ds.config.recipe import Recipe
from gigatok_ds.planning.cluster import Cluster
from gigatok_ds.planning.devices import device_named, this_cpu
from gigatok_ds.planning.planner import Plan, Planner
from gigatok_ds.planning.speed import Assumptions


def cluster_here(environment: Mapping[str, str]) -> Cluster:
    """What the launcher has started this rank on: equal hosts, all like this one, of which every rank thinks the same.

    Raises InputError for a GPU that is not known.
    """
    rank = launched_rank(environment)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(rank.local_rank)
        device = device_named(found.name, found.total_memory)
    else:
        device = this_cpu(rank.local_size)
    return Cluster(hosts=rank.world_size // rank.local_size, per_host=rank.local_size, device=device)


def plan_here(recipe: Recipe) -> Plan:
    """Raises InputError where nothing fits."""
    return Planner(recipe, cluster_here(os.environ), Assumptions()).recommended()
