"""Plain data, as JSON has it, to dataclasses: every name and every type is checked, nothing is guessed."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from gigatok_ds.errors import InputError

_LARGEST = 2**63


def from_plain(hint: Any, value: Any, where: str) -> Any:
    """`value` as `hint`: a dataclass from a dictionary with its fields, a tuple from a list, numbers and text as they
    are.

    Raises InputError, naming the place below `where`, for an unknown or missing name, for another type (true is no
    number, and a float is no int), and for a number beyond 64 bits.
    """
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _instance(hint, value, where)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return _one_of(arguments, value, where)
    if origin is typing.Literal:
        if value not in arguments or type(value) not in map(type, arguments):
            _refuse(where, value, " or ".join(map(repr, arguments)))
        return value
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            _refuse(where, value, "a list")
        return origin(from_plain(arguments[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            _refuse(where, value, "a section")
        kind = arguments[1] if arguments else object
        return {key: from_plain(kind, item, f"{where}.{key}") for key, item in value.items()}
    if hint is object:
        return value
    if hint is float and type(value) is int and abs(value) < _LARGEST:
        return value
    if type(value) is not hint or (hint is int and abs(value) >= _LARGEST):
        _refuse(where, value, {int: "a whole number", float: "a number", str: "text", bool: "true or false",
                               types.NoneType: "null"}[hint])
    return value


def _instance(hint: type, value: Any, where: str) -> Any:
    if isinstance(value, hint):
        return value
    if not isinstance(value, dict):
        _refuse(where, value, "a section")
    hints = typing.get_type_hints(hint)
    fields = {field.name: field for field in dataclasses.fields(hint)}
    for name in value:
        if name not in fields:
            raise InputError(f"{where} has no setting {str(name)[:80]!r}; there are {', '.join(fields)}")
    for name, field in fields.items():
        if name not in value and field.default is field.default_factory is dataclasses.MISSING:
            raise InputError(f"{where}.{name} is missing")
    return hint(**{name: from_plain(hints[name], item, f"{where}.{name}") for name, item in value.items()})


def _one_of(options: tuple, value: Any, where: str) -> Any:
    """The value as the first option that it can be; a section is explained by the section's own error."""
    for option in options:
        if isinstance(value, dict) == (dataclasses.is_dataclass(option) or option is dict):
            try:
                return from_plain(option, value, where)
            except InputError:
                if isinstance(value, dict):
                    raise
    names = [getattr(option, "__name__", str(option)).replace("NoneType", "null") for option in options]
    _refuse(where, value, " or ".join(names))
    return None


def _refuse(where: str, value: Any, wanted: str) -> typing.NoReturn:
    raise InputError(f"{where} is {repr(value)[:80]}; it must be {wanted}")
