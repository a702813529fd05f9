"""Training: from a recipe to a run's folder with an adapter in it; `veneer.train(...)` calls this package."""

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from veneer.adapters.adapter import Adapter
    from veneer.base.base import Base
    from veneer.recipe.settings import Recipe
    from veneer.train.events import Listener
    from veneer.train.run import Run


class Verb(ModuleType):
    """This package, which can be called."""

    def __call__(
        self,
        recipe: "Recipe | Mapping[str, Any] | str | Path | Base",
        adapter: "Adapter | None" = None,
        *,
        data: str | Path | Mapping[str, Any] | None = None,
        eval: str | Path | None = None,  # noqa: A002
        lr: float | None = None,
        steps: int | None = None,
        epochs: float | None = None,
        run: str | Path | None = None,
        listeners: "Sequence[Listener]" = (),
        say: Callable[[str], None] = lambda text: None,
        **settings: Any,
    ) -> "Run":
        """Train an adapter, or resume its run; returns the run's figures.

            veneer.train("recipe.yaml", steps=50)
            veneer.train(base, adapter, data="train.jsonl", lr=1e-3)

        recipe      a recipe (its file, a mapping, a Recipe), or the base that `adapter` is attached to, which is then
                    trained in place
        data        the training rows, or the recipe's `data` section
        eval        held-out rows
        run         the run's folder; for a base and an adapter by default a new one under runs/
        listeners   are called with every step, restart and evaluation (veneer.train.events.Event)
        say         is told what happens before the first step
        settings    other keys of a recipe: a section as a mapping (train={"max_length": 512}), or a name of PEFT's or
                    TRL's (num_train_epochs=2)
        Raises ConfigError, DataError, ModelError or TargetError before the first step for what does not fit,
        TrainingError if training cannot go on.  Ctrl-C writes a checkpoint; the same call then resumes the run.
        """
        from veneer.train.call import train

        rows = data if isinstance(data, Mapping) else {"train": data}
        named: dict[str, Any] = {"optimizer.lr": lr, "train.steps": steps, "train.epochs": epochs, "run": run}
        named |= {f"data.{key}": value for key, value in rows.items()}
        if eval is not None:
            named["data.eval"] = eval
        given = {key: str(v) if isinstance(v, Path) else v for key, v in named.items() if v is not None}
        return train(recipe, adapter, {**settings, **given}, listeners, say)


sys.modules[__name__].__class__ = Verb
