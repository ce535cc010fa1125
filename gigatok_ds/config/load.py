"""Recipes: YAML files, validated strictly against the dataclasses of `config.recipe`.

A recipe may inherit from another with `base: NAME`; `key.sub=value` overrides come last. An unknown key, a
wrong type or a missing key is an InputError that says where, what is allowed and which name was meant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import types
import typing
from collections.abc import Hashable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config

from gigatok_ds.config import losses, model, recipe
from gigatok_ds.config.location import masked
from gigatok_ds.config.recipe import GPTRecipe, Recipe, TokenizerRecipe
from gigatok_ds.config.sources import DataSource, masked_sources
from gigatok_ds.errors import InputError
from gigatok_ds.files import write_atomically
from gigatok_ds.untrusted import read_bytes

_KINDS: dict[str, type] = {"tokenizer": TokenizerRecipe, "gpt": GPTRecipe}
# Settings of a run that may change when it is resumed: how often it reports, how it computes, where copies of data are
# kept, how much of it may be bad, and where the same frozen weights (their SHA-256 is compared) are found.
_CHANGEABLE = ("log_every", "validate_every", "compile", "precision", "micro_batch_size", "workers", "cache",
               "cache_gb", "patience", "max_bad_fraction", "weights", "backbone_weights")
_CHANGEABLE_SECTIONS = ("parallel.", "checkpoint.", "validation.", "monitor.", "faults.")
# Where the data lies: what it is, training.data_record compares.
DATA_LOCATIONS = ("data.train", "data.second", "data.validation", "data.tokenizer")
_SHOWN = 3  # problems named in one error
MOST_CHARACTERS, MOST_NODES = 250_000, 100_000  # of a recipe

# The schemas are plain dataclasses, so that inference needs no pydantic; strictness is switched on here.
for _schema in (*vars(model).values(), *vars(losses).values(), *vars(recipe).values(), DataSource):
    if dataclasses.is_dataclass(_schema) and isinstance(_schema, type):
        with_config(ConfigDict(extra="forbid", allow_inf_nan=False))(_schema)


class _Loader(yaml.SafeLoader):
    """YAML with the numbers of YAML 1.2 (1e-4 is one; 010, 1:30 and dates are text), and no repeated keys."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("int", "float", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever text `_Loader` would read as a number."""


_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(r"[-+]?((\d[\d_]*\.?\d*|\.\d+)[eE][-+]?\d+|\d[\d_]*\.\d*|\.\d+|\.inf)$|\.nan$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:int", _INTEGER, list("-+0123456789"))
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value!r} appears twice", problem_mark=key.start_mark)
            seen.add(key.value)
    return yaml.SafeLoader.construct_mapping(loader, node, deep=True)


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are once each alias stands for a copy, counted without making any. ValueError for too many.
    """
    if id(node) not in known:
        known[id(node)] = MOST_NODES + 1  # of a node that holds itself
        inner = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + (0 if isinstance(node, yaml.ScalarNode)
                               else sum(_expanded(part, known) for part in inner))
    if known[id(node)] > MOST_NODES:
        raise ValueError(f"its anchors (&) and aliases (*) stand for more than {MOST_NODES:,} values; write them out")
    return known[id(node)]


def _load(text: str) -> Any:
    """The value of a YAML document. Raises ValueError before more is made of it than anybody writes."""
    if len(text) > MOST_CHARACTERS:
        raise ValueError(f"it is longer than the {MOST_CHARACTERS:,} characters that a recipe may have")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _expanded(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in resources.files("gigatok_ds.recipes").iterdir()
                  if path.name.endswith(".yaml"))


def recipe_summary(name: str) -> str:
    """The first line of a packaged recipe, a comment: what it is, and what was published of it."""
    return _packaged(name).partition("\n")[0].lstrip("# ")


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of that name, or in that YAML file, with `key.sub=value` overrides (values are YAML).

    Raises InputError for anything that is not exactly a recipe.
    """
    name = str(name_or_path)
    data = _inherited(name, Path(), ())
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise InputError(f"{name}: kind is {_show(kind)}; it must be one of {', '.join(_KINDS)}")
    for override in overrides:
        _override(data, _KINDS[kind], override)
    return _validated(data, _KINDS[kind], name)


def without_secrets(recipe: Recipe) -> Recipe:
    """The same, with the secrets in the locations of its data masked: what may be kept and shown."""
    given = {name: getattr(recipe.data, name.removeprefix("data."), None) for name in DATA_LOCATIONS}
    shown: dict[str, Any] = {name.removeprefix("data."): masked_sources(value)
                             for name, value in given.items() if value}
    data: Any = dataclasses.replace(recipe.data, **shown)  # of the same kind as the recipe's own
    return dataclasses.replace(recipe, data=data)


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain dictionaries, lists, numbers and strings."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return plain


def differing_keys(one: Recipe, other: Recipe) -> list[str]:
    """Dotted keys whose values differ, other than those that may change in the middle of a run."""
    ours, theirs = _flat(recipe_to_dict(one)), _flat(recipe_to_dict(other))
    return [key for key in sorted(ours.keys() | theirs.keys()) if ours.get(key) != theirs.get(key)
            and not key.startswith(_CHANGEABLE_SECTIONS) and key.split(".")[-1] not in _CHANGEABLE]


def _flat(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        flat |= _flat(value, name + ".") if isinstance(value, dict) else {name: value}
    return flat


def recipe_to_yaml(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that `load_recipe` reads back to an equal recipe."""
    return yaml.dump(recipe_to_dict(recipe), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def save_resolved(recipe: Recipe, path: str | Path) -> None:
    """Write `recipe_to_yaml` to `path`, all of it or nothing, `without_secrets`."""
    write_atomically(Path(path), recipe_to_yaml(without_secrets(recipe)).encode())


def _inherited(name: str, folder: Path, seen: tuple[str, ...]) -> dict[str, Any]:
    """The mapping of a recipe, merged into that of its base. A path is relative to `folder`."""
    packaged = name in recipe_names()
    source = name if packaged else str(folder / name)
    if source in seen:
        raise InputError(f"recipe {seen[0]} inherits from itself: {' -> '.join([*seen, source])}")
    data = _parse(_packaged(name) if packaged else _read(source), source)
    if not isinstance(data, dict):
        raise InputError(f"{source} is not a recipe: a mapping with kind, name, model, ... is expected")
    base = data.pop("base", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise InputError(f"{source}: base is {_show(base)}; it must name a recipe or a YAML file")
    parent = _inherited(base, Path(source).parent, (*seen, source))
    if data.get("kind", parent.get("kind")) != parent.get("kind"):
        kinds = f"kind is {_show(data['kind'])}, but its base {base} is {_show(parent.get('kind'))}"
        raise InputError(f"{source}: {kinds}")
    return _merged(parent, data)


def _packaged(name: str) -> str:
    return (resources.files("gigatok_ds.recipes") / f"{name}.yaml").read_text("utf-8")


def _read(path: str) -> str:
    if not Path(path).is_file():
        near = _nearest(Path(path).stem, recipe_names())
        hint = f"did you mean {near}?" if near else f"recipes are {', '.join(recipe_names())}"
        raise InputError(f"there is no recipe {path!r} and no such YAML file; {hint}")
    try:
        return read_bytes(Path(path), 4 * MOST_CHARACTERS).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not a YAML text file: {error}") from None


def _parse(text: str, source: str) -> Any:
    try:
        # Through JSON: only plain values pass, and sections that share a YAML anchor become separate.
        return json.loads(json.dumps(_load(text)))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputError(f"{source}{where}: {problem}") from None
    except (TypeError, RecursionError):
        allowed = "text, numbers, true, false, null, lists and mappings"
        raise InputError(f"{source}: only {allowed} are allowed") from None
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {key: _merged(base[key], value) for key, value in over.items()
            if isinstance(value, dict) and isinstance(base.get(key), dict)}
    return base | over | both


def _override(data: dict[str, Any], schema: type, override: str) -> None:
    """Set one `key.sub=value` in `data`. A section that is null or absent is created."""
    key, separator, text = override.partition("=")
    *sections, last = key.split(".")
    if not separator or not all((*sections, last)):
        raise InputError(f"override {_show(override)} is not of the form key.sub=value")
    for depth, section in enumerate(sections, start=1):
        if not isinstance(data.get(section), dict):
            path = sections[:depth]
            if data.get(section) is not None and not _fields_at(schema, path):
                raise InputError(f"override {_show(override)}: {'.'.join(path)} has no settings of its own")
            data[section] = {}
        data = data[section]
    data[last] = _parse(text, f"override {_show(override)}: not valid YAML, quote the value if it is text")


def _validated(data: dict[str, Any], schema: type, name: str) -> Recipe:
    try:
        # As JSON, strictly: lists may become tuples, but "8" is not 8 and true is not 1.
        return TypeAdapter(schema).validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        # A misspelt key also leaves one missing: name the spelling first.
        problems = sorted(dict.fromkeys(_problems(error, schema)), key=lambda text: "unknown key" not in text)
    more = f" (and {len(problems) - _SHOWN} more)" if len(problems) > _SHOWN else ""
    raise InputError(f"{name}: {'; '.join(problems[:_SHOWN])}{more}")


def _problems(error: ValidationError, schema: type) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        if isinstance(detail.get("ctx", {}).get("error"), InputError):
            yield str(detail["ctx"]["error"])
            continue
        path, member, union = _located(schema, detail["loc"])
        if member and not _is_meant(member, union, detail["input"]):
            continue  # text, a section or a list of these is allowed here: only what was meant is worth explaining
        key = ".".join(path)
        if detail["type"] == "unexpected_keyword_argument":
            yield f"unknown key {key}; {_suggestion(schema, path)}"
        elif detail["type"] == "missing":
            yield f"{key} is missing"
        else:
            also = f", or {_other_forms(schema, path)}" if member is str else ""
            yield f"{key} is {_show(detail['input'])}: {detail['msg'][0].lower()}{detail['msg'][1:]}{also}"


def _is_meant(member: Any, union: list[Any], value: Any) -> bool:
    """Whether a value is an attempt at this member of a union, which holds text beside sections or a list of these."""
    forms = [list if typing.get_origin(option) is tuple else dict for option in union if option is not str]
    if member is str:
        return not isinstance(value, tuple(forms))
    return isinstance(value, list if typing.get_origin(member) is tuple else dict)


def _other_forms(schema: type, path: list[str]) -> str:
    """What may stand there instead of text."""
    if fields := _fields_at(schema, path):
        return f"a section of {', '.join(fields)}"
    return f"a list of sections of {', '.join(_fields_at(schema, [*path, '0']))}"


def _located(schema: type, location: tuple[Any, ...]) -> tuple[list[str], type | None, list[Any]]:
    """The dotted key of a pydantic location; if it ends in a member of a union, that, and what else is in it."""
    path: list[str] = []
    hint: Any = schema
    member: type | None = None
    union: list[Any] = []
    for part in location:
        members = {getattr(option, "__name__", ""): option for option in _options(hint)}
        if len(members) > 1:
            union = list(members.values())
            member = hint = members.get("tuple" if str(part).startswith("tuple[") else part)
        else:
            path.append(str(part))
            hint, member = _inner(hint, str(part)), None
    return path, member, union


def _options(hint: Any) -> list[Any]:
    """The types that `hint` allows, null aside."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [option for option in typing.get_args(hint) if option is not types.NoneType]
    return [hint]


def _field_types(hint: Any) -> dict[str, Any]:
    """Types of the settings in a section; empty for what is not a section."""
    schema = next((option for option in _options(hint) if dataclasses.is_dataclass(option)), None)
    return typing.get_type_hints(schema) if schema else {}


def _fields_at(schema: type, path: Sequence[str]) -> list[str]:
    """Names of the settings in the section `path`; empty when it is not a section."""
    hint: Any = schema
    for part in path:
        hint = _inner(hint, part)
    return list(_field_types(hint))


def _inner(hint: Any, part: str) -> Any:
    """The type of a setting in a section, or of a place in a list."""
    if part.isdecimal():
        lists = (option for option in _options(hint) if typing.get_origin(option) is tuple)
        return next((typing.get_args(option)[0] for option in lists), None)
    return _field_types(hint).get(part)


def _suggestion(schema: type, path: list[str]) -> str:
    """What may have been meant by an unknown key: a sibling, or the same name in another section."""
    siblings = _fields_at(schema, path[:-1])
    elsewhere = [key for key in _all_keys(schema) if key.split(".")[-1] == path[-1]]
    if len(elsewhere) == 1:
        return f"did you mean {elsewhere[0]}?"
    near = _nearest(path[-1], siblings)
    if near:
        return f"did you mean {near}?"
    return f"allowed are {', '.join(siblings)}"


def _all_keys(hint: Any, prefix: str = "") -> Iterator[str]:
    for name, inner in _field_types(hint).items():
        yield prefix + name
        yield from _all_keys(inner, f"{prefix}{name}.")


def _nearest(name: str, names: Sequence[str]) -> str | None:
    """The name that `name` is probably a misspelling of, capitals aside."""
    lowered = {candidate.lower(): candidate for candidate in names}
    near = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=0.5)
    return lowered[near[0]] if near else None


def _show(value: Any) -> str:
    text = masked(repr(value))
    return text if len(text) <= 80 else f"{text[:80]}..."
