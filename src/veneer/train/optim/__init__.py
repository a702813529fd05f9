"""How parameters step: one file per optimizer, registered in OPTIMIZERS."""

from veneer.registry import import_siblings
from veneer.train.optim.param_groups import OPTIMIZERS, build_optimizer

import_siblings(__name__, list(__path__))

__all__ = ["OPTIMIZERS", "build_optimizer"]
