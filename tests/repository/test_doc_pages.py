"""Tables and names of docs/ are true: recipes, sizes, rooms, files, options of scripts, and what docs/extend.md
promises.
"""

import dataclasses
import re
import typing

import pytest
import torch
from documented_commands import PAGES
from places import PACKAGE, ROOT, TESTS
from rank_runs import run_ranks
from torch import nn
from training_runs import TOKENIZER, image_shards

from gigatok_ds.checkpoint.original import build_on_meta
from gigatok_ds.config import losses as loss_settings
from gigatok_ds.config import model as model_settings
from gigatok_ds.config.deepspeed import zero_settings
from gigatok_ds.config.load import load_recipe, recipe_names, recipe_summary
from gigatok_ds.config.model import GPT_SIZES, TRANSFORMER_SIZES, TransformerSize
from gigatok_ds.losses import adversarial, feature, reconstruction
from gigatok_ds.losses.semantic import check_teacher
from gigatok_ds.models import quantizer
from gigatok_ds.models.frozen.frozen_vit import VITS
from gigatok_ds.monitoring.metrics import read_metrics

DOCS = ROOT / "docs"


def recipe_row(name):
    recipe = load_recipe(name)
    millions = sum(parameter.numel() for parameter in build_on_meta(recipe.model).parameters()) / 1e6
    size = f"{millions / 1000:.1f}B" if millions > 999 else f"{millions:.1f}M" if millions < 10 else f"{millions:.0f}M"
    training = recipe.training
    return (f"| `{name}` | {size} | {training.steps:,} | {training.global_batch_size} | {training.precision} | "
            f"{recipe_summary(name)} |")


def test_the_table_of_recipes_is_true():
    page = (DOCS / "recipes.md").read_text()
    assert re.findall(r"^\| `.*$", page, re.MULTILINE) == [recipe_row(name) for name in recipe_names()]
    for name, size in (TRANSFORMER_SIZES | GPT_SIZES).items():
        assert f"`{name}` ({size.width} x {size.layers})" in " ".join(page.split())


def test_a_recipe_file_as_shown_is_one(tmp_path):
    text = re.search(r"```yaml\n(.*?)```", (DOCS / "recipes.md").read_text(), re.DOTALL)[1]
    (tmp_path / "mine.yaml").write_text(text)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert recipe.model.decoder == TransformerSize(width=640, layers=8, heads=10)
    check_teacher(recipe.loss.semantic, recipe.model)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_anchors_that_a_page_names_exist(page):
    text = page.read_text()
    for path in re.findall(r"`((?:gigatok_ds|tests|launch|docs|ds_configs|tools|benchmarks)/[\w./-]+)", text):
        assert (ROOT / path).exists(), path
    if page.name == "architecture.md":
        rooms = "|".join(child.name for child in PACKAGE.iterdir() if child.is_dir())
        for path in re.findall(rf"`((?:{rooms})/[\w./]*)`", text):
            assert (PACKAGE / path).exists(), path
    for target, anchor in re.findall(r"\]\(([\w/.-]*)#([\w-]+)\)", text):
        other = (page.parent / target) if target else page
        headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
        assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], (target,
                                                                                                               anchor)


def test_every_room_is_on_the_page_of_the_architecture():
    page = (DOCS / "architecture.md").read_text()
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert set(re.findall(r"^\| `(\w+)/`", page, re.MULTILINE)) == rooms


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_of_benchmarks_in_the_text_are_theirs(page):
    for script, options in re.findall(r"`python (benchmarks/\w+\.py)([^`]*)`", page.read_text()):
        for option in re.findall(r"--[\w-]+", options):
            assert f'"{option}"' in (ROOT / script).read_text(), (script, option)


def texts():
    """(path, text) of what is written in this repository."""
    folders = ("gigatok_ds", "tests", "benchmarks", "tools", "launch", "docs", ".github")
    paths = [*ROOT.glob("*.*"), *(path for folder in folders for path in (ROOT / folder).rglob("*.*"))]
    for path in sorted(paths):
        if path.suffix in (".cpp", ".md", ".py", ".sh", ".toml", ".yaml", ".yml"):
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def test_the_tests_that_are_named_somewhere_exist():
    named = {(*found, path) for path, text in texts()
             for found in re.findall(r"\btests/([\w/-]+(?:\.\w+)?)(?:::(\w+))?", text)}
    assert len([name for _, name, path in named if name and path == "docs/reliability.md"]) >= 20
    for file, name, path in named:
        assert (TESTS / file).exists(), f"{path} names tests/{file}"
        assert not name or f"def {name}(" in (TESTS / file).read_text(), f"{file} has no {name}, which {path} names"


def test_every_line_of_the_tables_of_faults_has_its_test():
    text = (DOCS / "reliability.md").read_text()
    for table, lines in (("Scenarios", 21), ("Nothing lost", 27), ("No image lost", 23)):
        section = text.partition(f"\n## {table}")[2].partition("\n## ")[0]
        rows = re.findall(r"^\| (\d+) \|.*`tests/.*\|$", section, re.MULTILINE)
        assert list(map(int, rows)) == list(range(1, lines + 1)), f"each line of {table} has its test"


def choices(settings, name):
    return set(typing.get_args(typing.get_type_hints(settings)[name]))


def test_names_in_the_settings_are_those_of_the_dictionaries():
    """An entry of either is of no use without the other."""
    assert choices(loss_settings.ReconstructionConfig, "kind") == set(reconstruction.RECONSTRUCTION_LOSSES)
    assert choices(loss_settings.AuxiliaryConfig, "feature") == set(feature.FEATURE_LOSSES)
    assert choices(loss_settings.AdversarialConfig, "discriminator_loss") == set(adversarial.DISCRIMINATOR_LOSSES)
    assert choices(loss_settings.AdversarialConfig, "generator_loss") == set(adversarial.GENERATOR_LOSSES)
    assert choices(model_settings.QuantizerConfig, "gradient") == set(quantizer.GRADIENTS)


def test_what_the_page_of_extensions_names_is_there():
    page = (DOCS / "extend.md").read_text()
    found = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)?)` in `(gigatok_ds/[\w/]+\.py)`", page)
    assert len(found) >= 10
    for name, path in found:
        owner, _, member = name.rpartition(".")
        text = (ROOT / path).read_text()
        assert re.search(rf"^\s*(?:def |class )?{member}\b", text, re.MULTILINE), (name, path)
        assert not owner or re.search(rf"^class {owner}\b", text, re.MULTILINE), (name, path)
    for teacher in VITS:
        assert f"`{teacher}`" in (DOCS / "training.md").read_text() or "{s,b,l,g}" in (DOCS / "training.md").read_text()


EXTENDED = """
base: {base}
name: extended
model:
  decoder: nano                                  # a size that was added
  semantic_head: {{depth: 1, teacher_width: 192}}
loss:
  semantic: {{teacher: vit_tiny_patch16_224, weights: random}}  # any vision transformer of timm's, by its name
  adversarial: {{start_step: 2}}
training: {{steps: 3, validate_every: 3}}
checkpoint: {{every: 3}}
"""


class Judge(nn.Module):
    """A discriminator of one's own: a logit for each patch."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Conv2d(3, 1, 4, stride=4)

    def forward(self, images, draws=None):
        return self.logits(images)


def train_extended(base, shards, out):
    """All additions of docs/extend.md at the places that it names, in one run."""
    from gigatok_ds.losses import composition
    from gigatok_ds.training.run import run_training

    TRANSFORMER_SIZES["nano"] = TransformerSize(width=32, layers=1, heads=2)
    reconstruction.RECONSTRUCTION_LOSSES["huber"] = torch.nn.functional.huber_loss
    quantizer.GRADIENTS["doubled"] = lambda z, codes: 2 * z + (codes - 2 * z).detach()
    composition._bare_discriminator = lambda config, layers, image_size: Judge()
    terms_of = composition.TokenizerObjective._terms_of

    def with_variation(self, images, seen, restored, discriminate, step):
        variation = (restored.diff(dim=-1).abs().mean() + restored.diff(dim=-2).abs().mean()).float()
        return terms_of(self, images, seen, restored, discriminate, step) | {"variation": 0.01 * variation}

    composition.TokenizerObjective._terms_of = with_variation
    (out.parent / "extended.yaml").write_text(EXTENDED.format(base=base))
    recipe = load_recipe(out.parent / "extended.yaml", [f"data.train={shards}", f"data.validation={shards}"])
    pixels = dataclasses.replace(recipe.loss.reconstruction, kind="huber")
    codes = dataclasses.replace(recipe.model.quantizer, gradient="doubled")
    run_training(dataclasses.replace(recipe, loss=dataclasses.replace(recipe.loss, reconstruction=pixels),
                                     model=dataclasses.replace(recipe.model, quantizer=codes)), out, zero_settings(1))


def test_everything_that_can_be_added_trains_and_is_logged(tmp_path):
    (tmp_path / "base.yaml").write_text(TOKENIZER)
    image_shards(tmp_path / "images", 16)
    run_ranks(train_extended, 1, tmp_path / "base.yaml", tmp_path / "images", tmp_path / "run")
    last = [line for line in read_metrics(tmp_path / "run") if "loss" in line][-1]
    for name in ("variation", "direct_variation", "reconstruction", "semantic", "adversarial"):
        assert last[f"loss/{name}"] != 0 and last[f"term_grad/{name}"] > 0, name
    assert last["discriminator/discriminator"] > 0
