"""What does a delta on a forward hook cost, compared with a module that wraps the layer?  Seconds a call of one layer.

    python benchmarks/hooks.py [--rounds 300]

Four forms of the same LoRA take turns on one frozen linear layer (576 -> 576), forward and backward: on a hook, as
`attach` hangs it; in the shortest wrapper that calls the layer; in peft's wrapper; and written out without any module.
For 1 token almost all of a call is Python; for 512 it is arithmetic.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import peft
import torch
from report import closing_line
from torch import Tensor, nn

from veneer.adapters.attach import attach
from veneer.methods.lora import LoRAConfig

WIDTH, RANK = 576, 16


class Wrapper(nn.Module):
    """The usual way: a module in the layer's place that holds the layer."""

    def __init__(self, layer: nn.Module, a: Tensor, b: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.a, self.b, self.scale = layer, nn.Parameter(a), nn.Parameter(b), scale

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        h = nn.functional.linear(x, self.a)
        return torch.addmm(y.view(-1, WIDTH), h.view(-1, RANK), self.b.T, alpha=self.scale).view(y.shape)


def forms() -> dict[str, Callable[[Tensor], Tensor]]:
    """The same delta, four ways."""
    frozen = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    hooked = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    hooked[0].load_state_dict(frozen.state_dict())
    adapter = attach(hooked, LoRAConfig(rank=RANK, init="random"), ("0",))
    a, b = (p.detach().clone() for p in adapter.parameters())
    scale = 16 / RANK
    bare_a, bare_b = a.clone().requires_grad_(), b.clone().requires_grad_()

    def bare(x: Tensor) -> Tensor:
        y, h = nn.functional.linear(x, frozen.weight), nn.functional.linear(x, bare_a)
        return torch.addmm(y.view(-1, WIDTH), h.view(-1, RANK), bare_b.T, alpha=scale).view(y.shape)

    settings = peft.LoraConfig(r=RANK, lora_alpha=16, target_modules=["0"])
    peers: nn.Module = peft.get_peft_model(nn.Sequential(copy.deepcopy(frozen)), settings).base_model.model
    peers.load_state_dict({"0.lora_A.default.weight": a, "0.lora_B.default.weight": b}, strict=False)
    wrapper = nn.Sequential(Wrapper(frozen, a, b, scale))
    return {"hook": hooked, "wrapper": wrapper, "peft": peers, "bare": bare}


def seconds(ways: dict[str, Callable[[Tensor], Tensor]], tokens: int, rounds: int) -> dict[str, float]:
    """Median seconds of one forward and backward of each way, taking turns."""
    x = torch.randn(1, tokens, WIDTH, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 20):
        for name in list(ways)[:: 1 if turn % 2 else -1]:
            began = time.perf_counter()
            ways[name](x).sum().backward()
            if turn >= 20:
                times[name].append(time.perf_counter() - began)
    return {name: round(statistics.median(t), 8) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    ways = forms()
    x = torch.randn(1, 3, WIDTH)
    outputs = [way(x) for way in ways.values()]
    assert all(torch.allclose(y, outputs[0], atol=1e-4) for y in outputs), "the forms should mean the same"
    figures = {f"seconds_{n}_tokens": seconds(ways, n, rounds) for n in (1, 512)}
    for name, by_way in figures.items():
        print(name, "  ".join(f"{way} {1e6 * s:.0f} us" for way, s in by_way.items()))
    closing_line(figures)


if __name__ == "__main__":
    main()
