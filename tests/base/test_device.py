"""Devices by name, and what the CPU answers; what runs on another device is tested where there is one."""

import pytest
import torch

from veneer import machine
from veneer.base.device import CPU, Device, find_device, refuse_device_word
from veneer.errors import ConfigError


@pytest.mark.parametrize("word", ["auto", "cpu", "cuda", "cuda:1", "mps"])
def test_known_words_pass_whether_this_machine_has_them_or_not(word: str) -> None:
    refuse_device_word(word)


@pytest.mark.parametrize(("word", "close"), [("cdua", "Did you mean 'cuda'"), ("cpu:1", ""), ("mps:0", ""), ("", "")])
def test_other_words_are_refused_with_close_matches(word: str, close: str) -> None:
    with pytest.raises(ConfigError, match=rf"device is '{word}'.*{close}.*Give auto, cpu, cuda, cuda:N or mps"):
        find_device(word)


def test_a_device_that_this_machine_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="device is cuda:3, but this machine has 1 CUDA devices"):
        find_device("cuda:3")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device is mps, but torch finds no MPS here"):
        find_device("mps")


def test_auto_is_cuda_if_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device() is CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert str(find_device()) == "cuda:0"


def test_random_numbers_drawn_inside_are_drawn_again_afterwards() -> None:
    with CPU.keeping_random_state():
        inside = torch.rand(4)
    assert torch.equal(inside, torch.rand(4)) and not torch.equal(inside, torch.rand(4))


def test_a_random_state_comes_back() -> None:
    state = CPU.random_state()
    drawn = torch.rand(4)
    CPU.set_random_state(state)
    assert torch.equal(drawn, torch.rand(4)) and set(state) == {"random"}


def test_offloaded_tensors_give_the_same_gradient() -> None:
    x = torch.arange(6.0).requires_grad_()
    with CPU.offloading():
        y = (x**3).sum()
    y.backward()
    assert torch.equal(x.grad, 3 * torch.arange(6.0) ** 2)


def test_memory_of_the_cpu_is_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "rss_bytes", lambda: 7)
    monkeypatch.setattr(machine, "peak_rss_bytes", lambda: 8)
    monkeypatch.setattr(machine, "available_bytes", lambda: 9)
    assert (CPU.used_bytes(), CPU.peak_bytes(), CPU.available_bytes()) == (7, 8, 9)


def test_only_the_cpu_trims(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    monkeypatch.setattr(machine, "trim_memory", lambda: trimmed.append(1))
    CPU.trim()
    Device(torch.device("cuda")).trim()
    assert trimmed == [1]


def test_what_is_an_accelerator() -> None:
    assert [Device(torch.device(d)).is_accelerator for d in ("cpu", "meta", "cuda", "mps")] == [
        False,
        False,
        True,
        True,
    ]


def test_words_for_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "compute_dtype", lambda: "float32")
    assert CPU.dtype("auto") is torch.float32 and Device(torch.device("cuda")).dtype("auto") is torch.bfloat16
    assert CPU.dtype(torch.float64) is torch.float64
    with pytest.raises(ConfigError, match=r"there is no dtype 'float23'\. Did you mean 'float32'"):
        CPU.dtype("float23")


def test_sums_are_float64_where_the_device_has_it() -> None:
    kinds = ("cpu", "cuda", "mps")
    assert [Device(torch.device(kind)).wide_dtype for kind in kinds] == [torch.float64, torch.float64, torch.float32]


def test_kernels_that_add_up_in_one_order_are_asked_for_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, bool]] = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda mode, warn_only: asked.append((mode, warn_only)))
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    CPU.add_up_in_one_order()
    assert asked == [] and torch.utils.deterministic.fill_uninitialized_memory
    Device(torch.device("cuda")).add_up_in_one_order()
    assert asked == [(True, True)] and not torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize(("word", "given"), [("cuda:1", ["cuda:1"]), ("mps", [])])
def test_the_random_state_is_that_of_the_device_itself(
    word: str, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.cuda takes the device, else it is the current one; torch.mps takes none."""
    asked: list[list[str]] = []

    class Module:
        def get_rng_state(self, *where: torch.device) -> torch.Tensor:
            asked.append([str(device) for device in where])
            return torch.zeros(1)

        def set_rng_state(self, state: torch.Tensor, *where: torch.device) -> None:
            asked.append([str(device) for device in where])

        def synchronize(self, *where: torch.device) -> None:
            asked.append([str(device) for device in where])

    monkeypatch.setattr(Device, "_module", Module())
    device = Device(torch.device(word))
    device.set_random_state(device.random_state())
    device.synchronize()
    assert asked == [given] * 3
