"""Every init in the registry: names, settings and PEFT's spellings; what each owes to LoRA and to DoRA."""

from typing import Any

import pytest
import torch
from torch import nn

from tests.methods.layers import delta_on, layer_of, linear, moved, rows, through
from veneer.adapters.attach import attach
from veneer.errors import ConfigError
from veneer.methods.base import config_from
from veneer.methods.dora import DoRAConfig
from veneer.methods.init import INITS
from veneer.methods.init.base import init_from, init_setting
from veneer.methods.init.eva import EVA
from veneer.methods.init.pissa import PiSSA
from veneer.methods.lora import LoRA, LoRAConfig
from veneer.methods.restartable import refuse_restarts


@pytest.mark.parametrize(
    ("given", "canonical"),
    [
        (True, "uniform"),
        (False, "random"),
        ("gaussian", "gaussian"),
        ("eva", "eva"),
        ("pissa_niter_16", {"name": "pissa", "iterations": 16}),
        ({"name": "pissa"}, "pissa"),
        ({"name": "pissa", "iterations": 4}, {"name": "pissa", "iterations": 4}),
    ],
)
def test_pefts_spellings_and_ours_are_one(given: Any, canonical: Any) -> None:
    assert init_setting(given) == canonical == init_setting(canonical)
    assert LoRAConfig(init=given) == LoRAConfig(init=canonical)
    assert config_from("lora", {"init": given}) == LoRAConfig(init=canonical)


def test_settings_are_typed() -> None:
    assert init_from("pissa_niter_16") == PiSSA(iterations=16)
    assert init_from({"name": "eva", "most": 3, "look": 100}) == EVA(most=3.0, look=100)
    assert LoRAConfig(init="eva").initializer == EVA() == LoRAConfig(init="eva").data_init
    assert LoRAConfig().data_init is None


@pytest.mark.parametrize(
    ("init", "said"),
    [
        ("pisa", r"^lora\.init: there is no init 'pisa'\. Did you mean 'pissa'\? Known: eva, gaussian, "),
        ({"name": "pissa", "itrations": 4}, r"^lora\.init: init pissa has no setting 'itrations'\. Did you mean 'ite"),
        ({"name": "eva", "look": "many"}, r"^lora\.init: eva\.look is 'many': input should be a valid integer"),
        ({"iterations": 4}, r"^lora\.init: an init is a name or a mapping with a name, like \{name: pissa\}, got \{"),
    ],
)
def test_what_no_init_has_is_refused_with_what_is_near(init: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoRAConfig(init=init)
    with pytest.raises(ConfigError, match=said):
        config_from("lora", {"init": init})


@pytest.mark.parametrize("init", INITS)
def test_every_init_trains_and_says_whether_it_changes_the_model(init: str) -> None:
    net, x = nn.Sequential(linear(9, 6)), rows(40, 9)
    plain = net(x)
    adapter = attach(net, LoRAConfig(rank=3, init=init), look=lambda: net(x)).train()
    assert torch.equal(net(x), plain) is INITS[init].no_change
    net(x).square().sum().backward()
    assert any(bool(torch.count_nonzero(p.grad)) for p in adapter.parameters() if p.grad is not None)


@pytest.mark.parametrize("init", INITS)
def test_a_restart_begins_at_no_change_or_is_refused(init: str) -> None:
    module, x, config = linear(9, 6), rows(4, 9), LoRAConfig(rank=3, init=init)
    if not INITS[init].no_change:
        with pytest.raises(ConfigError, match=f"lora.init {init} starts with a change"):
            refuse_restarts(config)
        return
    delta = moved(delta_on(module, config)).eval()
    want = through(module, delta, x)
    delta.remember_()
    delta.restart_(torch.Generator().manual_seed(1))
    assert torch.allclose(through(module, delta, x), want, atol=1e-5)
    size = sum(t.numel() for t in delta.past.values())
    assert size == LoRA.n_past(layer_of(module), config, 1)


@pytest.mark.parametrize("init", INITS)
def test_dora_takes_those_that_are_drawn(init: str) -> None:
    if INITS[init].drawn:
        assert DoRAConfig(init=init).initializer == INITS[init]()
        return
    with pytest.raises(ConfigError, match=f"^dora.init must be one of gaussian, random, uniform, got '{init}'$"):
        DoRAConfig(init=init)
