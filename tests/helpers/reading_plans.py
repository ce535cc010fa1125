"""Batches by keyword arguments alone, of which some are the plan's."""

from dataclasses import fields

from gigatok_ds.data.reader import ReadingPlan

PLANNED = {field.name for field in fields(ReadingPlan)}


def planned(kind, *data, **arguments):
    """kind: ImageBatches or CodeBatches, of that data."""
    plan = ReadingPlan(**{name: value for name, value in arguments.items() if name in PLANNED})
    return kind(*data, plan, **{name: value for name, value in arguments.items() if name not in PLANNED})
