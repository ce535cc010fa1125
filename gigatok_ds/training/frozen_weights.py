"""The frozen networks' files of a run: there before any rank starts, and the same ones whenever it is resumed."""

from __future__ import annotations

import json
from pathlib import Path

from gigatok_ds.cluster.launched import launched_rank
from gigatok_ds.config.recipe import Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError
from gigatok_ds.evaluation.inception import inception_file, load_inception
from gigatok_ds.files import write_atomically
from gigatok_ds.losses.frozen import weight_files
from gigatok_ds.losses.semantic import check_teacher
from gigatok_ds.plain import from_plain
from gigatok_ds.untrusted import read_json

_INCEPTION = "validation.inception"
FROZEN_FILE = "frozen_weights.json"


def check_frozen(recipe: Recipe) -> None:
    """InputError when a frozen network is unknown or has no file, or the tokenizer does not fit the teacher.

    What the recipe wants downloaded is, by the first rank of each host; its other ranks find it later.
    """
    if not isinstance(recipe, TokenizerRecipe):
        return
    if recipe.loss.semantic:
        check_teacher(recipe.loss.semantic, recipe.model)
    weights = recipe.validation.inception
    inception = None if weights is None else inception_file(weights, _INCEPTION)
    for file in [*weight_files(recipe.loss), *([inception] if inception else [])]:
        if launched_rank().is_first_of_host:
            file.fetch()
        if not (file.is_random or file.wants_download):
            file.find()
    if weights is not None and inception and not inception.wants_download:
        load_inception(weights, _INCEPTION)


def random_weight_warnings(recipe: Recipe) -> list[str]:
    """One line per frozen network with random weights."""
    files = weight_files(recipe.loss) if isinstance(recipe, TokenizerRecipe) else []
    return [f"{file.setting} is random: a loss looks through an untrained network (instead of {file.what}), which is "
            "good for tests and dry runs only" for file in files if file.is_random]


def record_frozen(recipe: Recipe, run_dir: Path, *, since: Path) -> None:
    """Write frozen_weights.json: by setting, each file's name and SHA-256 (null for random weights).

    Raises InputError, and writes nothing, when the run that began in the directory `since` did so with other files.
    """
    files = weight_files(recipe.loss) if isinstance(recipe, TokenizerRecipe) else []
    if not files:
        return
    now = {file.setting: {"file": None if file.is_random else file.find().name, "sha256": file.sha256()}
           for file in files}
    earlier_file = since / FROZEN_FILE
    before = now
    if earlier_file.is_file():
        before = from_plain(dict[str, dict[str, str | None]], read_json(earlier_file), str(earlier_file))
    for setting, entry in now.items():
        earlier = before.get(setting, entry).get("sha256")
        if earlier != entry["sha256"]:
            raise InputError(f"{setting}: the run in {since} was started with {_named(earlier)}, but this is "
                             f"{_named(entry['sha256'])}; give it the same weights, or choose another --out")
    write_atomically(run_dir / FROZEN_FILE, (json.dumps(now, indent=2) + "\n").encode())


def _named(digest: str | None) -> str:
    return f"a file of SHA-256 {digest[:16]}..." if digest else "random weights"
