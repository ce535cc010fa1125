"""What training steps really allocate, from the allocator's own record."""

import bisect
import gc

import torch
from torch._C._profiler import _EventType

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
    within, allocations = None, []
    events = list(profile.profiler.kineto_results.experimental_event_tree())
    while events:
        event = events.pop()
        events += event.children
        if event.tag == _EventType.Allocation:
            allocations.append(event)
        elif event.name == name:
            within = event
    alive, peak = _Alive(), 0
    for event in sorted(allocations, key=lambda event: event.start_time_ns):
        alive.note(event.extra_fields.ptr, event.extra_fields.alloc_size)
        if within.start_time_ns <= event.start_time_ns <= within.end_time_ns:
            peak = max(peak, alive.total)
    return peak


class _Alive:
    """Bytes that are allocated, by their places. The profiler does not hear of what Gloo's threads free: it is gone
    when its place is allocated again."""

    def __init__(self):
        self.starts, self.sizes, self.total = [], {}, 0

    def note(self, start, size):
        """size: negative if freed."""
        if size > 0:
            first = bisect.bisect_left(self.starts, start)
            if first and self.starts[first - 1] + self.sizes[self.starts[first - 1]] > start:
                first -= 1
            while first < len(self.starts) and self.starts[first] < start + size:
                self._remove(first)
            self.starts.insert(first, start)
            self.sizes[start] = size
            self.total += size
        elif start in self.sizes:
            self._remove(bisect.bisect_left(self.starts, start))

    def _remove(self, index):
        self.total -= self.sizes.pop(self.starts.pop(index))
