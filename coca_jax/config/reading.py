"""ConfigDict <-> dataclass: unknown keys and wrong types are refused, naming what is near."""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
from ml_collections import config_dict

from coca_jax.config.keys import Config, ConfigError


def default() -> ml_collections.ConfigDict:
    """Every key with its default, as a locked ConfigDict: where a recipe starts."""
    return config_dict.ConfigDict(dataclasses.asdict(Config())).lock()


def from_config_dict(config: Mapping[str, Any]) -> Config:
    """Freezes a ConfigDict (or a plain nested mapping, as read from JSON).

    Missing keys take their defaults. Raises ConfigError for an unknown key, naming its neighbours, and for a value of
    the wrong type.
    """
    return _freeze(Config, config.to_dict() if isinstance(config, config_dict.ConfigDict) else config, "")


def to_json(config: Config) -> str:
    """The whole configuration as JSON; `from_config_dict(json.loads(...))` gives it back."""
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def get(config: Config, path: str) -> Any:
    """The value at a dotted path, e.g. `get(config, "model.image.width")`."""
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def check_key(path: str) -> None:
    """Raises ConfigError, naming its neighbours, where a dotted path such as `model.image.width` is not a key."""
    group: Any = Config
    done = ""
    for name in path.split("."):
        hints = typing.get_type_hints(group) if dataclasses.is_dataclass(group) else {}
        if not hints:
            raise ConfigError(f"config.{path} is not a key: config.{done.rstrip('.')} holds a value, not keys")
        _known(name, hints, done)
        group, done = hints[name], f"{done}{name}."


def _known(key: str, hints: Mapping[str, Any], path: str) -> None:
    if key not in hints:
        near = difflib.get_close_matches(str(key), hints, n=3, cutoff=0.4) or sorted(hints)
        raise ConfigError(f"config.{path}{key} is not a key; near it: {', '.join(f'config.{path}{k}' for k in near)}")


def _freeze(cls: type, values: Any, path: str) -> Any:
    if not isinstance(values, Mapping):
        raise ConfigError(f"{f'config.{path}'.rstrip('.')}={values!r} is not a group of keys")
    hints = typing.get_type_hints(cls)
    for key in values:
        _known(key, hints, path)
    return cls(**{key: _coerce(hints[key], value, f"{path}{key}") for key, value in values.items()})


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return _freeze(typing.cast(type, hint), value, path + ".")
    origin = typing.get_origin(hint)
    if origin is tuple:
        items = typing.get_args(hint)
        if isinstance(value, (list, tuple)):
            if items[-1] is Ellipsis:
                return tuple(_coerce(items[0], v, path) for v in value)
            if len(value) == len(items):
                return tuple(_coerce(t, v, path) for t, v in zip(items, value, strict=True))
        wanted = str(hint).removeprefix("typing.")
        raise ConfigError(f"config.{path}={value!r} is not a {wanted}")
    assert not isinstance(hint, types.UnionType), f"config.{path}: unions are not supported"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"config.{path}={value!r} is a {type(value).__name__}, not a {hint.__name__}")
    return value
