"""Small models as standalone checkpoints."""

from gigatok_ds.checkpoint.standalone import save_standalone


def save_models(folder, **models):
    """Each in a directory of its name below `folder`, which is returned."""
    for name, model in models.items():
        save_standalone(folder / name, model.config, model.state_dict())
    return folder
