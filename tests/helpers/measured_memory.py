"""What training steps really allocate, from the allocator's own record."""

import gc

import torch

from gigatok_ds.config.deepspeed import resolve_deepspeed, zero_settings
from gigatok_ds.training.schedules import lr_of_iteration

SMALL_BUCKETS = {"reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000,
                 "stage3_prefetch_bucket_size": 100_000}


def settings_of(stage):
    """Buckets in proportion to small networks."""
    settings = zero_settings(stage)
    known = SMALL_BUCKETS if stage == 3 else {name: SMALL_BUCKETS[name] for name
                                              in ("reduce_bucket_size", "allgather_bucket_size")}
    settings["zero_optimization"] |= known if stage else {}
    return settings


def peak_bytes(recipe, stage, first_step):
    """On the ranks of `rank_runs`: the most bytes that this rank has allocated in the second of two steps from
    `first_step` on, of whatever is allocated from before the networks are built; and the elements of its trained
    parameters."""
    from gigatok_ds.parallel.topology import start_process_group, stop_process_group
    from gigatok_ds.training.run import open_task

    topology = start_process_group(tensor_size=recipe.parallel.tensor, sequence_parallel=recipe.parallel.sequence)
    settings, _ = resolve_deepspeed(settings_of(stage), recipe, data_parallel_size=topology.data_size)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        _, build = open_task(recipe, topology, settings)
        task = build()
        batches = task.micro_batches(first_step - 1)
        for step in (first_step, first_step + 1):
            with torch.profiler.record_function(f"step {step}"):
                one_step(task, batches, recipe, settings["gradient_accumulation_steps"], step)
    stop_process_group(topology)
    elements = sum(getattr(parameter, "ds_numel", parameter.numel()) for engine in task.engines.values()
                   for parameter in engine.network.parameters())
    return most_allocated(profile, f"step {first_step + 1}"), elements


def one_step(task, batches, recipe, accumulation, step):
    rates = task.learning_rates(step,
                                lr_of_iteration(recipe.schedule, recipe.optimizer.lr, recipe.training.steps, step - 1))
    for _ in range(accumulation):
        task.train_micro_batch(next(batches), step)
        gc.collect()  # whenever Python finds cycles of its own accord is no part of a prediction
        for name, lr in rates.items():
            task.engines[name].step(lr)


def most_allocated(profile, name):
    """Bytes, at most, within the range of that name."""
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    within = next(event for event in events if event.name() == name)
    start, end = within.start_ns(), within.start_ns() + within.duration_ns()
    total = peak = 0
    for event in events:
        if event.name() == "[memory]":
            total += event.nbytes()
            if start <= event.start_ns() <= end:
                peak = max(peak, total)
    return peak
