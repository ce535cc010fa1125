"""DeepSpeed's settings, as DeepSpeed's own models of them understand them: asked before any engine is built."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gigatok_ds.config.deepspeed_keys import nearest
from gigatok_ds.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel


def check_with_deepspeed(settings: Mapping[str, Any], source: str) -> None:
    """Raise InputError, with one line, for the first key or value of a section that DeepSpeed does not take.

    settings: those sections that `config.deepspeed` lets pass; `auto` stands for DeepSpeed's default.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    import gigatok_ds.engine.engine  # noqa: F401, what DeepSpeed reads while it is imported

    models = {"zero_optimization": DeepSpeedZeroConfig, "bf16": DeepSpeedBF16Config, "fp16": DeepSpeedFP16Config,
              "comms_logger": CommsLoggerConfig, "timers.throughput": DeepSpeedThroughputTimerConfig}
    for path, model in models.items():
        section: Any = settings
        for name in path.split("."):
            section = section.get(name, {}) if isinstance(section, Mapping) else {}
        _check_section(section, model, path, source)


def _check_section(section: Any, model: type[BaseModel], path: str, source: str) -> None:
    from pydantic import BaseModel, ValidationError

    if not isinstance(section, Mapping):
        raise InputError(f"{source}: {path} is {section!r}; it must be a JSON object")
    fields = {alias: field for name, field in model.model_fields.items() for alias in (field.alias or name, name)}
    for key, value in section.items():
        if key not in fields:
            raise InputError(f"{source}: unknown key {key!r} in {path}; {nearest(key, fields, allowed=fields)}")
        inner = next((kind for kind in (typing.get_args(fields[key].annotation) or (fields[key].annotation,))
                      if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner and value is not None:
            _check_section(value, inner, f"{path}.{key}", source)
    try:
        model(**section)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place, reason = ".".join(map(str, (path, *first["loc"]))), first["msg"].removeprefix("Value error, ")
        shown = f" is {first['input']!r}" if first["loc"] else ""
        raise InputError(f"{source}: {place}{shown}: {reason[:1].lower()}{reason[1:]}") from None
    except AssertionError as error:
        raise InputError(f"{source}: {path}: {error}") from None
