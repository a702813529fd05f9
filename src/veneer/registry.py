"""A registry maps names to objects; each object registers itself where it is defined.

Registering a taken name is an error. Looking up an unknown name lists the known ones.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from veneer.errors import ConfigError, did_you_mean

T = TypeVar("T")
S = TypeVar("S")


class Registry(Generic[T]):
    """Named objects of one kind, sorted by name.

    noun    what messages call them, e.g. "method"
    """

    def __init__(self, noun: str) -> None:
        self.noun = noun
        self._things: dict[str, T] = {}

    def add(self, name: str) -> Callable[[S], S]:
        """Decorator: register a class or function under `name`.  Raises ConfigError if the name is taken."""

        def register(thing: S) -> S:
            if name in self._things:
                raise ConfigError(f"{self.noun} {name!r} is already registered, by {self._things[name]!r}")
            self._things[name] = thing  # type: ignore[assignment]
            return thing

        return register

    def __getitem__(self, name: str) -> T:
        if name not in self._things:
            hint = did_you_mean(name, self._things)
            raise ConfigError(f"there is no {self.noun} {name!r}{hint} Known: {', '.join(self)}.")
        return self._things[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._things))

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __len__(self) -> int:
        return len(self._things)


def import_siblings(package: str, path: list[str]) -> None:
    """Import every module of `package`, so that each registers itself."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
