"""Find every problem with the values of a recipe, under the key that it belongs to."""

import re
from collections.abc import Iterator, Mapping, Sequence
from reprlib import repr as repr_of
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from veneer.errors import ConfigError, did_you_mean
from veneer.recipe.aliases import SAME_MEANING, SECTIONS, Problem
from veneer.recipe.settings import NONE, MethodSettings, PromptSettings, Recipe, RestartSettings, StorageSettings


def keys() -> dict[str, str]:
    """Every dotted key of a recipe with its one-line help; `method`, `prompt` and `storage` have more of their own."""
    return {key: " ".join((field.description or "").split()) for key, field in fields(Recipe)}


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted key and definition of every key below the sections."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def takes(field: FieldInfo | None, kind: Any) -> bool:
    """Whether the field accepts values of this type."""
    annotation = None if field is None else field.annotation
    return annotation == kind or (get_origin(annotation) is not tuple and kind in get_args(annotation))


def boolean_problems(settings: Mapping[Any, Any]) -> list[Problem]:
    """Booleans in numeric fields, which pydantic would read as 1 and 0."""
    problems = []
    for key, field in fields(Recipe):
        section, _, leaf = key.rpartition(".")
        inside = settings.get(section) if section else settings
        value = inside.get(leaf) if isinstance(inside, Mapping) else None
        if isinstance(value, bool) and not takes(field, bool) and not takes(field, str):
            problems.append((key, f"{key} is {value}, where a number belongs. {keys()[key]}"))
    return problems


def setting_problems(settings: Mapping[Any, Any]) -> list[Problem]:
    """Problems with what is registered by name, and with its own settings."""
    finders = (method_problems, prompt_problems, storage_problems, word_problems)
    return [problem for find in finders for problem in find(settings)]


def method_problems(settings: Mapping[Any, Any]) -> list[Problem]:
    """Problems with the method's own settings and with restarts."""
    from veneer.methods.base import config_from  # not at import: brings torch
    from veneer.methods.restartable import refuse_restarts

    try:
        method = MethodSettings.model_validate(settings.get("method", {}))
        if method.name == NONE:
            return _without_method(method, settings)
        config = config_from(method.name, method.own)
    except ValidationError:
        return []  # said already
    except ConfigError as error:
        return _by_setting("method", error, r"^\w+[.:] ?(\w+)")
    try:
        if _restarting(settings):
            refuse_restarts(config)
    except ConfigError as error:
        return [("restarts.every", str(error))]
    return []


def _restarting(settings: Mapping[Any, Any]) -> bool:
    try:
        return bool(RestartSettings.model_validate(settings.get("restarts", {})).every)
    except ValidationError:
        return False  # said already


def _without_method(method: MethodSettings, settings: Mapping[Any, Any]) -> list[Problem]:
    plain = MethodSettings(name=NONE).model_dump()
    idle = sorted(key for key, value in method.model_dump().items() if plain.get(key, ...) != value)
    problems = [(f"method.{key}", f"method.{key} is given, but method is none; leave it out") for key in idle]
    prompt = settings.get("prompt")
    if (prompt.get("name", NONE) if isinstance(prompt, Mapping) else NONE) == NONE:
        problems.append(("method.name", "method is none and there is no prompt, so nothing would be trained"))
    if _restarting(settings):
        problems.append(
            ("restarts", "a prompt alone is no change of a weight that could be folded; leave restarts out")
        )
    return problems


def prompt_problems(settings: Mapping[Any, Any]) -> list[Problem]:
    """Problems with the prompt's own settings."""
    from veneer.prompts.base import config_from  # not at import: brings torch

    try:
        prompt = PromptSettings.model_validate(settings.get("prompt", {}))
        if prompt.name != NONE:
            config_from(prompt.name, prompt.own)
    except ValidationError:
        return []  # said already
    except ConfigError as error:
        return _by_setting("prompt", error, r"^\w+[.:] ?(\w+)")
    idle = sorted(prompt.own) if prompt.name == NONE else []
    return [(f"prompt.{key}", f"prompt.{key} is given, but no prompt.name; name one (prompt, prefix)") for key in idle]


def storage_problems(settings: Mapping[Any, Any]) -> list[Problem]:
    """Problems with the storage's own settings."""
    from veneer.base.storage_config import base_storage  # not at import: brings torch

    try:
        base_storage(StorageSettings.model_validate(settings.get("storage", {})).model_dump())
    except ValidationError:
        return []  # said already
    except ConfigError as error:
        return _by_setting("storage", error, r"^\w+[.:] ?(\w+) is")
    return []


def word_problems(settings: Mapping[Any, Any]) -> list[Problem]:
    """Unknown tasks and devices."""
    from veneer.base.device import refuse_device_word  # not at import: brings torch
    from veneer.tasks import TASKS

    problems = []
    for key, check in (("task", TASKS.__getitem__), ("device", refuse_device_word)):
        try:
            if isinstance(word := settings.get(key), str):
                check(word)
        except ConfigError as error:
            problems.append((key, str(error)))
    return problems


def _by_setting(section: str, error: ConfigError, naming: str) -> list[Problem]:
    """Each line of an error under the setting it is about; `naming` finds a known one."""
    problems = []
    for message in str(error).replace("\nIt has:", " It has:").split("\n"):
        named = re.search(rf"has no setting '([^']+)'|{naming}", message)
        problems.append((f"{section}.{(named[1] or named[2]) if named else 'name'}", message))
    return problems


def type_problems(error: ValidationError, known: set[str]) -> list[Problem]:
    """Pydantic's errors, worded with the recipe's keys."""
    problems = []
    for problem in error.errors():
        key = _key(problem["loc"], known)
        if problem["type"] == "extra_forbidden":
            section, _, leaf = key.rpartition(".")
            inside = f"{section}." if section else ""
            near = [k.removeprefix(inside) for k in [*SECTIONS, *keys(), *SAME_MEANING] if k.startswith(inside)]
            message = f"there is no key {key}{did_you_mean(leaf, near)}"
        elif problem["type"] == "missing":
            message = f"{key} is missing: {keys().get(key, 'it has no default')}"
        elif isinstance((problem.get("ctx") or {}).get("error"), ConfigError):
            message = str(problem["ctx"]["error"])
        else:
            message = _wrong_value(key, problem["input"], problem["msg"])
        problems.append((key, message))
    return problems


def _wrong_value(key: str, given: Any, wanted: str) -> str:
    said = wanted.removeprefix("Value error, ")
    quotes = " Put quotes around a text that begins with a brace." if isinstance(given, dict) else ""
    return f"{key} is {repr_of(given)}: {said[0].lower()}{said[1:]}. {keys().get(key, '')}{quotes}".rstrip()


def _key(location: Sequence[int | str], known: set[str]) -> str:
    """The dotted key of a pydantic location, without the parts that name a branch of a union or an index."""
    parts = [str(part) for part in location if isinstance(part, str)]
    dotted = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((key for key in dotted if key in known), dotted[0] if dotted else "")
