"""A folder in which documented commands run in a small form: what a reader has before the first of them, under the same
names.
"""

import numpy as np
import torch
from imagenet_files import devkit, tar_bytes
from places import ROOT
from small_models import small_gpt, small_tokenizer
from small_shards import encoded, make_images
from training_runs import GPT, TOKENIZER

from gigatok_ds.checkpoint.original import to_original
from gigatok_ds.checkpoint.standalone import save_standalone
from gigatok_ds.config.load import load_recipe
from gigatok_ds.models.gpt import GPT as GPTNetwork
from gigatok_ds.models.initialisation import initialise_
from gigatok_ds.models.tokenizer import Tokenizer

CHECKOUT = ("launch", "benchmarks", "tools", "ds_configs", "gigatok_ds")
# The tokenizer of tests/helpers/training_runs.py with the frozen networks that the published ones have: VGG16 and a
# teacher, a small one.
SMALL_TOKENIZER = """
base: whole.yaml
name: small_tokenizer
model: {semantic_head: {depth: 1, teacher_width: 192}}
loss:
  perceptual: {weights: random}
  semantic: {teacher: vit_tiny_patch16_224, weights: random}
  quantizer: {entropy_end_step: 4}
  adversarial: {start_step: 2}
  auxiliary: {end_step: 3}
training: {steps: 4}
checkpoint: {every: 2}
"""
CLASSES = 5


def build(folder):
    """Fill an empty folder; the checkout's own directories are links."""
    for name in CHECKOUT:
        (folder / name).symlink_to(ROOT / name)
    (folder / "small").mkdir()
    (folder / "small" / "whole.yaml").write_text(TOKENIZER)
    (folder / "small" / "tokenizer.yaml").write_text(SMALL_TOKENIZER)
    (folder / "small" / "gpt.yaml").write_text(GPT)
    (folder / "hostfile").write_text("".join(f"worker-{number} slots=8\n" for number in range(1, 9)))
    _images(folder)
    _models(folder)
    rng = np.random.default_rng(0)
    np.savez(folder / "VIRTUAL_imagenet256_labeled.npz", rng.integers(0, 256, (8, 16, 16, 3), dtype=np.uint8))


def _images(folder):
    names = [f"n0000000{number}" for number in range(CLASSES)]
    groups = {name: {f"{name}_{number}.JPEG": encoded(number) for number in range(4)} for name in names}
    (folder / "ILSVRC2012_img_train.tar").write_bytes(
        tar_bytes({f"{name}.tar": tar_bytes(group) for name, group in groups.items()}))
    make_images(folder / "photos", {f"{name}/{file}": data for name in names for file, data in groups[name].items()})
    make_images(folder / "holidays", {f"2024/{number}.jpg": encoded(number) for number in range(4)})
    (folder / "ILSVRC2012_img_val.tar").write_bytes(
        tar_bytes({f"ILSVRC2012_val_{number:08d}.JPEG": encoded(number) for number in range(1, 9)}))
    numbers = range(1, CLASSES + 1)
    devkit(folder, truth=[1 + number % CLASSES for number in range(8)],
           synsets=[(number, names[number - 1], 0) for number
                    in numbers]).rename(folder / "ILSVRC2012_devkit_t12.tar.gz")


def _models(folder):
    recipe = load_recipe(folder / "small" / "tokenizer.yaml")
    tokenizer = initialise_(Tokenizer(recipe.model), seed=0)
    torch.save({"model": dict(to_original(recipe.model, tokenizer.state_dict()))}, folder / "VQ_BL256_e200.pt")
    for place, model in ((folder / "checkpoints" / "tokenizer-xlxxl", small_tokenizer()),
                         (folder / "checkpoints" / "gpt-b-xlxxl", small_gpt())):
        save_standalone(place, model.config, model.state_dict())
    for kind, network in (("tokenizer", Tokenizer), ("gpt", GPTNetwork)):
        model = initialise_(network(load_recipe(f"demo_{kind}").model), seed=0)
        save_standalone(folder / "runs" / "demo" / "export" / kind, model.config, model.state_dict())
