"""Which methods can be restarted, and what the others are told."""

import pytest

from tests.methods.layers import delta_on, linear
from veneer.errors import ConfigError
from veneer.methods.base import METHODS, Delta, config_from
from veneer.methods.restartable import Restartable, refuse_restarts, restartable

SHARING = {"mora": {"variant": "sharing"}}


def test_lora_dora_and_mora_can() -> None:
    assert [name for name in METHODS if issubclass(METHODS[name], Restartable)] == ["dora", "lora", "mora"]


@pytest.mark.parametrize("method", METHODS)
def test_the_others_are_refused_by_name_with_what_to_use(method: str) -> None:
    config = config_from(method, SHARING.get(method, {}))
    if issubclass(METHODS[method], Restartable):
        refuse_restarts(config)
        return
    why = "cannot be restarted: a restart folds" if method == "bottleneck" else "gains nothing from restarts: cycles"
    with pytest.raises(ConfigError, match=f"^{method} {why}.*; use lora, dora, or mora with variant sharing"):
        refuse_restarts(config)


def test_a_delta_knows_nothing_of_restarts() -> None:
    own = set(vars(Restartable)) - set(vars(Delta)) - {"__annotations__", "__firstlineno__", "__static_attributes__"}
    assert {"restart_", "remember_", "fold_past", "n_past", "refuse_restarts", "now", "past_in_weight"} <= own
    module = linear(4, 4)
    deltas = {name: delta_on(module, config_from(name, {})) for name in ("lora", "ia3")}
    assert list(restartable(deltas)) == ["lora"]
