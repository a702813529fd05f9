"""Settings of a method, storage or prompt: validate a plain mapping into its dataclass."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from veneer.errors import ConfigError, did_you_mean

C = TypeVar("C")


def typed(noun: str, name: str, config: type[C], settings: Mapping[str, Any]) -> C:
    """Validate `settings` into `config`, the dataclass of the `noun` (method, storage, prompt) called `name`.

    Raises ConfigError for unknown fields, with close matches, and for values of the wrong type.
    """
    known = [f.name for f in fields(config)]  # type: ignore[arg-type]
    unknown = [f"{noun} {name} has no setting {k!r}{did_you_mean(k, known)}" for k in settings if k not in known]
    if unknown:
        raise ConfigError("\n".join([*unknown, f"It has: {', '.join(known) or 'none'}."]))
    hashable: Any = config
    try:
        checked: C = _checker(hashable).validate_python(dict(settings))
    except ValidationError as error:
        raise ConfigError("\n".join(_wording(name, e) for e in error.errors())) from None
    return checked


@cache
def _checker(config: Any) -> TypeAdapter[Any]:
    return TypeAdapter(config)


def _wording(name: str, problem: Mapping[str, Any]) -> str:
    """Turn one pydantic error into a line.  A ConfigError raised by the dataclass itself is passed through."""
    refusal = problem.get("ctx", {}).get("error")
    if isinstance(refusal, ConfigError):
        return str(refusal)
    said = problem["msg"]
    return f"{name}.{'.'.join(map(str, problem['loc']))} is {problem['input']!r}: {said[0].lower()}{said[1:]}"
