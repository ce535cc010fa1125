"""Recipes: YAML files, validated strictly against the dataclasses of `config.recipe`.

A recipe may inherit from another with `base: NAME`; `key.sub=value` overrides come last. An unknown key, a wrong type
or a missing key is an InputError that says where, what is allowed and which name was probably meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import typing
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from gigatok_ds.config import model, recipe
from gigatok_ds.config.recipe import GPTRecipe, Recipe, TokenizerRecipe
from gigatok_ds.errors import InputError

_KINDS: dict[str, type] = {"tokenizer": TokenizerRecipe, "gpt": GPTRecipe}
_SHOWN = 3  # problems named in one error

# The schemas are plain dataclasses, so that inference needs no pydantic; strictness is switched on here.
for _schema in (*vars(model).values(), *vars(recipe).values()):
    if dataclasses.is_dataclass(_schema) and isinstance(_schema, type):
        _schema.__pydantic_config__ = ConfigDict(extra="forbid")


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number, as in YAML 1.2, and whose repeated keys are errors."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in resources.files("gigatok_ds.recipes").iterdir()
                  if path.name.endswith(".yaml"))


def recipe_summary(name: str) -> str:
    """The comment at the top of a packaged recipe: what it is, and what was published of it."""
    text, _ = _read(name)
    comment = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    return " ".join(comment)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that YAML file, with `key.sub=value` overrides (values are YAML).

    Raises InputError for anything that is not exactly a recipe.
    """
    data = _inherited(str(name_or_path), ())
    schema = _KINDS.get(data.get("kind"))
    if schema is None:
        raise InputError(f"{name_or_path}: kind is {data.get('kind')!r}; it must be one of {', '.join(_KINDS)}")
    for override in overrides:
        _override(data, schema, override)
    return _validated(data, schema, str(name_or_path))


def recipe_to_dict(recipe: Recipe) -> dict:
    """A recipe as plain dictionaries, lists, numbers and strings."""
    return json.loads(json.dumps(dataclasses.asdict(recipe)))


def save_resolved(recipe: Recipe, path: str | Path) -> None:
    """Write the whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.partial")
    scratch.write_text(yaml.safe_dump(recipe_to_dict(recipe), sort_keys=False), encoding="utf-8")
    os.replace(scratch, path)


def _inherited(name_or_path: str, seen: tuple[str, ...]) -> dict:
    """The mapping of a recipe, merged into that of its base."""
    if name_or_path in seen:
        raise InputError(f"recipe {seen[0]} inherits from itself: {' -> '.join([*seen, name_or_path])}")
    data = _parse(*_read(name_or_path))
    base = data.pop("base", None)
    return data if base is None else _merged(_inherited(str(base), (*seen, name_or_path)), data)


def _read(name_or_path: str) -> tuple[str, str]:
    """Text of a recipe, and what to call it in errors."""
    if name_or_path in recipe_names():
        return (resources.files("gigatok_ds.recipes") / f"{name_or_path}.yaml").read_text("utf-8"), name_or_path
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") or not path.is_file():
        near = _nearest(path.stem, recipe_names()) or ", ".join(recipe_names())
        raise InputError(f"there is no recipe {name_or_path!r} and no such YAML file; did you mean {near}?")
    return path.read_text("utf-8"), name_or_path


def _parse(text: str, name: str) -> dict:
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"{name}{where}: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{name} is not a recipe: a mapping with kind, name, model, ... is expected")
    return data


def _merged(base: dict, over: dict) -> dict:
    both = {key: _merged(base[key], value) for key, value in over.items()
            if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return base | over | both


def _override(data: dict, schema: type, override: str) -> None:
    """Set one `key.sub=value` in `data`. A section that is null or absent is created."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"override {override!r} is not of the form key.sub=value")
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        if not isinstance(data.get(section), dict):
            if data.get(section) is not None and not _fields_at(schema, sections[: depth + 1]):
                raise InputError(f"override {override!r}: {'.'.join(sections[: depth + 1])} has no settings of its own")
            data[section] = {}
        data = data[section]
    data[last] = _parse_value(text, override)


def _parse_value(text: str, override: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: the value is not valid YAML; quote it if it is text") from None


def _validated(data: dict, schema: type, name: str) -> Recipe:
    try:
        # As JSON, strictly: lists may become tuples, but "8" is not 8 and true is not 1.
        return TypeAdapter(schema).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problems(error, schema)))
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: {error}") from None
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    raise InputError(f"{name}: {'; '.join(problems[:_SHOWN])}{more}")


def _problems(error: ValidationError, schema: type) -> Iterator[str]:
    for detail in error.errors():
        if isinstance(detail.get("ctx", {}).get("error"), InputError):
            yield str(detail["ctx"]["error"])
            continue
        if detail["loc"][-1] == "str" and isinstance(detail["input"], dict):
            continue  # a size that is spelled out: the other member of the union says what is wrong with it
        # Members of a union appear in the location under their type's name; they are not keys.
        path = [str(part) for part in detail["loc"] if str(part) not in ("str", "TransformerSize")]
        key = ".".join(path)
        if detail["type"] == "unexpected_keyword_argument":
            allowed = _fields_at(schema, path[:-1])
            near = _nearest(path[-1], allowed)
            yield f"unknown key {key}; " + (f"did you mean {near}?" if near else f"allowed are {', '.join(allowed)}")
        elif detail["type"] == "missing":
            yield f"{key} is missing"
        else:
            yield f"{key} is {detail['input']!r}: {detail['msg'][0].lower()}{detail['msg'][1:]}"


def _fields_at(schema: type, path: Sequence[str]) -> list[str]:
    """Names of the settings in the section `path`; empty when it is not a section."""
    for part in path:
        hints = typing.get_type_hints(schema) if dataclasses.is_dataclass(schema) else {}
        candidates = (hints.get(part), *typing.get_args(hints.get(part)))
        schema = next((hint for hint in candidates if dataclasses.is_dataclass(hint)), None)
        if schema is None:
            return []
    return [field.name for field in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []


def _nearest(name: str, names: Sequence[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.5)), None)
