"""Plain data, as YAML gives it, checked against type hints: what `recipe.py` declares becomes dataclasses."""

import dataclasses
import difflib
import types
import typing
from typing import Any, Literal

import yaml


class RecipeError(ValueError):
    """A recipe or an override that cannot be used; the message names the key and the fix."""


def parse_yaml(text: str, name: str) -> Any:
    """Plain data from the text of a file; RecipeError naming it and the place where it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{name} is not YAML: {error}") from error


def build(kind: type, data: Any, where: str) -> Any:
    """Instantiates dataclass `kind` from a dict, recursively; `where` is the dotted path for messages."""
    label = where or "the recipe"
    if not isinstance(data, dict):
        raise RecipeError(f"{label}: expected keys and values, got {data!r}")
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind)}
    for key in data:
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.4)
            dotted = f"{where}.{key}" if where else key
            fix = f"did you mean {near[0]!r}?" if near else f"valid keys: {', '.join(fields)}"
            raise RecipeError(f"unknown key {dotted!r}: {fix}")
    missing = [
        name
        for name, f in fields.items()
        if name not in data and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise RecipeError(f"{label} lacks the key{'s' if len(missing) > 1 else ''} {', '.join(missing)}")
    return kind(**{k: convert(hints[k], v, f"{where}.{k}" if where else k) for k, v in data.items()})


def convert(kind: Any, value: Any, where: str) -> Any:
    """Checks `value` against a type hint and converts what YAML 1.1 reads differently ("1e-3" is text to it)."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        options = [a for a in arguments if a is not type(None)]
        for option in options:
            try:
                return convert(option, value, where)
            except RecipeError as error:
                failure = error
        if len(options) == 1:
            raise failure
        raise RecipeError(f"{where}: {value!r} is none of {', '.join(getattr(o, '__name__', str(o)) for o in options)}")
    if origin is Literal:
        if value not in arguments:
            raise RecipeError(f"{where}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is list:
        if not isinstance(value, list):
            raise RecipeError(f"{where}: expected a list, got {value!r}")
        return [convert(arguments[0], item, f"{where}.{i}") for i, item in enumerate(value)]
    if kind is list or kind is dict or origin is dict:
        expected = list if kind is list else dict
        if not isinstance(value, expected):
            raise RecipeError(f"{where}: expected a {expected.__name__}, got {value!r}")
        return value if origin is None else {k: convert(arguments[1], v, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(kind):
        return build(kind, value, where)
    if kind is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise RecipeError(f"{where}: expected a number, got {value!r}") from None
    if kind is int and isinstance(value, float) and value == int(value):
        return int(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where}: expected {kind.__name__}, got {value!r}")
    return value
