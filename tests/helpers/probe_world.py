"""What linear probes take, in small: models, images to train on and to test with."""

from small_models import small_gpt_config, small_tokenizer

from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.demo.digits import CLASSES, digits_splits
from gigatok_ds.models.gpt import GPT
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.packing.shard_writer import write_shards


def probe_world(folder):
    """Small models with dropout in the GPT, and digits of 16 pixels: 5 classes, 40 training and 13 test images."""
    tokenizer, gpt = small_tokenizer(), initialise_(GPT(small_gpt_config(residual_dropout=0.1, token_dropout=0.1)),
                                                    seed=0)
    save_standalone(folder / "tok", tokenizer.config, tokenizer.state_dict())
    save_standalone(folder / "gpt", gpt.config, gpt.state_dict())
    train, test = digits_splits(16)
    for name, samples, count in (("train", train, 40), ("val", test, 13)):
        chosen = [sample for sample in samples if sample.label < 5][:count]
        write_shards(iter(chosen), folder / name, prefix=name, classes=CLASSES[:5])
    return folder
