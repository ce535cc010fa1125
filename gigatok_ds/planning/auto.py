"""The recommended layout for the GPUs that a job finds itself on."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from gigatok_ds.config.recipe import Recipe
from gigatok_ds.planning.cluster import Cluster
from gigatok_ds.planning.devices import device_named, this_cpu
from gigatok_ds.planning.planner import Plan, Planner
from gigatok_ds.planning.speed import Assumptions


def cluster_here(environment: Mapping[str, str]) -> Cluster:
    """What the launcher has started this rank on: equal hosts, all like this one, of which every rank thinks the same.

    Raises InputError for a GPU that is not known.
    """
    ranks = int(environment.get("WORLD_SIZE", 1))
    per_host = int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or ranks)
    if torch.cuda.is_available():
        found = torch.cuda.get_device_properties(int(environment.get("LOCAL_RANK", 0)))
        device = device_named(found.name, found.total_memory)
    else:
        device = this_cpu(per_host)
    return Cluster(hosts=ranks // per_host, per_host=per_host, device=device)


def plan_here(recipe: Recipe) -> Plan:
    """Raises InputError where nothing fits."""
    return Planner(recipe, cluster_here(os.environ), Assumptions()).recommended()
