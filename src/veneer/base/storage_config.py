"""How a base model's weights are kept: which storage, and whether embeddings and the output head are kept in it too."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from veneer.disk.adapter_dir import read_facts
from veneer.errors import ConfigError
from veneer.models.blocks import output_head
from veneer.storage import STORAGES, Storage, StorageConfig, config_from
from veneer.storage.bnb import BACKENDS, Backend
from veneer.storage.fourbit import FourBitConfig
from veneer.storage.layers import Stored

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class BaseStorage:
    """A storage for the linear layers of a model; None in its place means dense, as the files have it."""

    config: StorageConfig
    head: bool = False
    """Keep the output head in it too."""
    embeddings: bool = False
    """Keep the input embedding in it too, with the head where both are one weight."""
    backend: Backend = field(default="auto", compare=False)
    """Whose kernels compute: a matter of the machine, not of the weights."""

    @property
    def settings(self) -> dict[str, Any]:
        """As a recipe's `storage` section says it, without the backend."""
        return {
            "name": self.config.storage,
            **asdict(self.config),
            "head": self.head,
            "embeddings": self.embeddings,
        }

    def __str__(self) -> str:
        given = {key: value for key, value in self.settings.items() if key != "name" and value is not False}
        own = ", ".join(f"{key} {value}" for key, value in given.items())
        return self.config.storage + (f" ({own})" if own else "")


def base_storage(settings: str | Mapping[str, Any]) -> BaseStorage | None:
    """What a recipe's `storage` says: a name, or `name` with settings; None for dense.

    Raises ConfigError for an unknown name or setting.
    """
    given = dict(settings) if isinstance(settings, Mapping) else {"name": settings}
    if not isinstance(name := given.pop("name", DENSE), str):
        raise ConfigError(f"storage is {name!r}, a name is needed: {', '.join(STORAGES)}")
    which: dict[str, Any] = {key: given.pop(key, False) for key in ("head", "embeddings")}
    if wrong := [f"storage.{key} is {value!r}, true or false is needed" for key, value in which.items()
                 if not isinstance(value, bool)]:  # fmt: skip
        raise ConfigError("\n".join(wrong))
    if (backend := given.pop("backend", "auto")) not in BACKENDS:
        raise ConfigError(f"storage.backend is {backend!r}, should be one of {', '.join(BACKENDS)}")
    config = config_from(name, given)
    if backend != "auto" and not isinstance(config, FourBitConfig):
        raise ConfigError(f"storage.backend is {backend}, but {name} has only one; leave it out")
    if name != DENSE:
        return BaseStorage(config=config, backend=backend, **which)
    if idle := [key for key, value in which.items() if value]:
        raise ConfigError(f"storage.{idle[0]} is true, but dense keeps every weight as it is; name a storage")
    return None


def storage_of(model: nn.Module) -> BaseStorage | None:
    """How the weights of `model` are kept; where layers differ, the first linear layer's storage speaks for all."""
    stored = {path: m for path, m in model.named_modules() if isinstance(m, Stored)}
    if not stored:
        return None
    head = output_head(model)
    embeddings = [p for p, m in stored.items() if isinstance(m, nn.Embedding)]
    inner = [m for p, m in stored.items() if p != head and p not in embeddings] or list(stored.values())
    own_head = head in stored and stored[head].saved
    return BaseStorage(config=config_of(inner[0].storage), head=own_head, embeddings=bool(embeddings))


def computed_by_kernels(storage: BaseStorage | None) -> bool:
    """Whether veneer's C library computes with weights that are kept so, on a CPU."""
    return storage is not None and isinstance(storage.config, FourBitConfig) and storage.backend != "bitsandbytes"


def config_of(storage: Storage) -> StorageConfig:
    """The settings that a weight is kept with: a storage has an attribute of each setting's name."""
    name = next(name for name in STORAGES if STORAGES[name] is type(storage))
    return config_from(name, {f.name: getattr(storage, f.name) for f in fields(STORAGES[name].Config)})


def storage_for(adapters: list[Path], asked: str | None) -> BaseStorage | None:
    """The storage that a base needs for these adapter folders: what is asked for, else what they were trained on.

    asked    a storage's name; with the settings of an adapter that was trained on this storage, else its defaults
    Raises ConfigError if adapters were trained on different ones and none is asked for.
    """
    trained = {folder: _trained_on(folder) for folder in adapters}
    if asked is not None:
        same = [s for s in trained.values() if s is not None and s.config.storage == asked]
        return same[0] if same else base_storage(asked)
    if len(set(trained.values())) > 1:
        listed = "\n".join(f"  {folder}: {storage or DENSE}" for folder, storage in trained.items())
        raise ConfigError(
            f"these adapters were trained on weights in different storages; choose one (storage=NAME):\n{listed}"
        )
    return next(iter(trained.values()), None)


def _trained_on(folder: Path) -> BaseStorage | None:
    base = read_facts(folder).get("base")
    storage = base.get("storage") if isinstance(base, dict) else None
    return base_storage(storage) if isinstance(storage, dict) else None
