"""What a training checkpoint holds, whole."""

from gigatok_ds.checkpoint.fragments import EMA, MOMENTS, WEIGHTS, SavedEngine


def read_weights(folder):
    """The float32 state_dict of an engine saved below `folder`."""
    return dict(SavedEngine(folder).tensors())


def read_ema(folder):
    """The averaged parameters by name."""
    saved = SavedEngine(folder)
    return {name: saved.read(EMA, name) for name in saved.layout.parameters}


def read_everything(folder):
    """Every tensor by kind and name, and how often Adam has updated each parameter."""
    saved = SavedEngine(folder)
    kinds = [kind for kind in (WEIGHTS, *MOMENTS, EMA) if saved.has(kind)]
    tensors = {(kind, name): saved.read(kind, name) for kind in kinds for name in saved.layout.parameters}
    full = {("whole", name): saved.read_full(name) for name in saved.full_names()}
    return tensors | full, saved.layout.adam_steps
