"""Fill a network without weights from its files, one tensor at a time: read, convert, place on the device."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from veneer.base.device import Device
from veneer.disk.tensors import Tensors
from veneer.errors import ModelError
from veneer.models.attention import use_veneer_attention
from veneer.models.blocks import name_in_files

OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that older files hold and today's models compute."""


def fill_(network: Any, tensors: Tensors, device: Device) -> None:
    """Set every parameter and persistent buffer of `network` from `tensors`.

    Raises ModelError, before a tensor is read, listing each that is missing, left over or of another shape.
    """
    sources = match(network, tensors)
    slots = dict(network.named_parameters(remove_duplicate=False))
    for group in _shared(network):
        for names in _really_tied(group, sources, tensors):
            dtype = torch.float32 if _stays_float32(network, names[0]) else slots[names[0]].dtype
            _set(network, names, tensors.read(sources[names[0]]).to(dtype).to(device.torch_device))
    for name, buffer in _saved_buffers(network).items():
        if name in sources:
            buffer.copy_(tensors.read(sources[name]))
    for name, buffer in network.named_buffers():
        _owner(network, name)._buffers[name.rpartition(".")[2]] = buffer.to(device.torch_device)


def rearranged_by_transformers(network: Any) -> bool:
    """Whether transformers arranges this architecture's weights otherwise than its files do (merged experts)."""
    from transformers import conversion_mapping

    known: Any = conversion_mapping.get_checkpoint_conversion_mapping
    return any(known(key) is not None for key in (type(network).__name__, network.config.model_type))


def load_through_transformers(kind: Any, folder: Path, dtype: torch.dtype, device: Device) -> Any:
    """Let transformers load and rearrange all weights; the peak is the model and its largest merge."""
    network, found = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    use_veneer_attention(network)
    words = {"missing_keys": "needed by the model, not in the files", "unexpected_keys": "unknown to the model"}
    words |= {"mismatched_keys": "of another shape in the files"}
    if problems := [f"{name}: {text}" for key, text in words.items() for name in sorted(found[key])]:
        raise _misfit(network, problems)
    for names in _shared(network):
        _set(network, names, network.get_parameter(names[0]).detach().to(device.torch_device))
    return network.to(device.torch_device)


def match(network: Any, tensors: Tensors) -> dict[str, str]:
    """Parameter or buffer name -> tensor name in the files.  Raises ModelError as `fill_` does."""
    slots = dict(network.named_parameters(remove_duplicate=False))
    buffers = _saved_buffers(network)
    wanted = slots | buffers
    sources = {name: there for name in wanted if (there := name_in_files(network, name, tensors)) is not None}
    ignored = re.compile("|".join([*(network._keys_to_ignore_on_load_unexpected or ()), *OLD_BUFFERS]))
    lost = [group[0] for group in _shared(network) if sources.keys().isdisjoint(group)]
    lost += [name for name in buffers if name not in sources and not ignored.search(name)]
    missing = [f"{name}: needed by the model, not in the files" for name in lost]
    left = [n for n in tensors if n not in set(sources.values()) and not ignored.search(n)]
    unexpected = [f"{name}: in the files, unknown to the model" for name in left]
    misfits = [
        f"{name}: {tensors[source].shape} in the files, {tuple(wanted[name].shape)} in the model"
        for name, source in sources.items()
        if tensors[source].shape != tuple(wanted[name].shape)
    ]
    if problems := missing + unexpected + misfits:
        raise _misfit(network, problems)
    return sources


def _shared(network: nn.Module) -> list[list[str]]:
    """The names of each parameter; tied weights are one parameter with several names."""
    names: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


def _saved_buffers(network: nn.Module) -> dict[str, Tensor]:
    saved = network.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in network.named_buffers() if name in saved}


def _set(network: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Make `tensor` the one frozen parameter behind all these names."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        _owner(network, name)._parameters[name.rpartition(".")[2]] = parameter


def _misfit(network: Any, problems: list[str]) -> ModelError:
    listed = "\n".join(f"  {p}" for p in problems)
    return ModelError(
        f"the weights do not fit {type(network).__name__} as config.json describes it; {len(problems)} differ:\n"
        f"{listed}\nNothing was loaded. Weights and config.json must come from the same model."
    )


def _really_tied(group: list[str], sources: dict[str, str], tensors: Tensors) -> list[list[str]]:
    """Split a group of tied names, one that is in the files first; names whose tensors differ there are not tied."""
    found = [name for name in group if name in sources]
    absent = [name for name in group if name not in sources]
    if len(found) == 1 or all(
        torch.equal(tensors.read(sources[found[0]]), tensors.read(sources[n])) for n in found[1:]
    ):
        return [found + absent]
    return [[found[0], *absent], *([name] for name in found[1:])]


def _stays_float32(network: Any, name: str) -> bool:
    patterns = set(network._keep_in_fp32_modules_strict or ())
    if network.config.dtype == torch.float16:
        patterns |= set(network._keep_in_fp32_modules or ())
    return any(re.search(rf"(^|\.){re.escape(p)}($|\.)", name) for p in patterns)


def _owner(network: nn.Module, name: str) -> nn.Module:
    return network.get_submodule(name.rpartition(".")[0])
