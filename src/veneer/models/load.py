"""Load a pretrained causal model, one tensor at a time: peak memory is the model and one tensor.

The model is built with its parameters on torch's meta device (its buffers, such as the rotary frequencies, are computed
by its own constructors), then each weight is read, converted, handed to `place` and set. What `place` returns is kept,
so another room can put a weight elsewhere before the next one is read. `furnish` may put modules of its own into the
empty model, with weights read from the files by its own means; this room knows nothing of quantized weights.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from veneer import machine
from veneer.disk.model_dir import open_model_dir
from veneer.disk.tensors import Tensors, open_tensors
from veneer.errors import ConfigError, ModelError, did_you_mean
from veneer.models.sources import resolve

__all__ = ["DTYPES", "Furnish", "Loaded", "Place", "build", "compute_dtype", "load_model", "load_tokenizer", "resolve"]

Place = Callable[[str, Tensor], Tensor]
"""Parameter name and its tensor (on the CPU, already in the compute dtype) -> what the model keeps."""

Furnish = Callable[[Any, Tensors], Tensors]
"""The model without weights and its files -> what is left in the files for the model's own parameters.

It may replace modules, and is called again on a whole model, with no files, where transformers had to load it.
"""

OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that older files hold and today's models compute."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Loaded:
    """A frozen model, ready for adapters."""

    model: Any
    """A transformers PreTrainedModel in eval mode; no parameter requires a gradient."""
    tokenizer: Any
    name: str
    """As it was asked for."""
    path: Path
    """The local folder it was read from."""


def load_model(
    model: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    place: Place | None = None,
    furnish: Furnish | None = None,
    device: str | torch.device = "cpu",
) -> Loaded:
    """Load `model` (an alias, a hub id, a folder or a .gguf file) with its tokenizer.

    dtype   "auto" (what this machine computes faster in), "float32", "bfloat16", "float16", or a torch dtype
    place   what becomes of each parameter; by default it is kept as it is
    furnish puts other modules in the model before its parameters are read; without it, quantized files are refused
    Raises ModelError (not found, not complete, tensors missing or unexpected) and ConfigError (unknown dtype).
    """
    chosen = compute_dtype(dtype)
    folder = resolve(model)
    about = open_model_dir(folder)
    with _quiet():
        quantized = about.config.get("quantization_config") is not None
        built = build(folder, chosen, quantized=furnish is not None)
        kind, tensors = type(built), open_tensors(folder)
        try:
            left = tensors if furnish is None else furnish(built, tensors)
            _fill(built, left, place or _keep, torch.device(device))
        except ModelError:
            if quantized or not _rearranged_by_transformers(built):
                raise
            built = _through_transformers(kind, folder, chosen, place or _keep, torch.device(device))
            if furnish is not None:
                furnish(built, tensors.without(tensors))
        _set_generation(built, folder)
        tokenizer = load_tokenizer(about.path)
    built.eval().requires_grad_(False)
    return Loaded(built, tokenizer, str(model), folder)


def load_tokenizer(model: str | Path) -> Any:
    """The tokenizer of `model`, as transformers loads it."""
    from transformers import AutoTokenizer

    folder = resolve(model)
    with _quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}: the tokenizer does not load: {error}") from error


def compute_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """A torch dtype for a recipe's word; "auto" asks the machine.  Raises ConfigError for any other word."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        dtype = machine.compute_dtype()
    if dtype not in DTYPES:
        raise ConfigError(f"there is no dtype {dtype!r}{did_you_mean(dtype, DTYPES)} Known: auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def _keep(name: str, tensor: Tensor) -> Tensor:
    return tensor


def build(folder: Path, dtype: torch.dtype, *, quantized: bool, blocks: int | None = None) -> Any:
    """The architecture of `folder`: parameters on the meta device, buffers real, random state untouched.

    quantized    whether weights that are quantized by bitsandbytes may be asked for
    blocks       only the first so many
    """
    from transformers import AutoConfig

    from veneer.models.attention import use_veneer_attention

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (stored := getattr(config, "quantization_config", None)) is not None:
            by = dict(stored).get("quant_method", "a method it does not name")
            if not quantized or by != "bitsandbytes":
                raise ModelError(
                    f"{folder} holds weights quantized by {by}; "
                    "give the model they were made from, and let veneer quantize it"
                )
            del config.quantization_config  # the model is dense until somebody puts other modules in
        if blocks is not None:
            _shorten(config.get_text_config(), blocks)
        with _quiet(), _parameters_on_meta(), torch.random.fork_rng(devices=[]):
            model = _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)
    except ModelError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        why = str(error).partition("\n")[0]  # without its list of all architectures
        raise ModelError(
            f"{folder}/config.json: transformers builds no causal model from it: {why} Give a causal language model."
        ) from error
    model.tie_weights()
    use_veneer_attention(model)
    return model


def _shorten(config: Any, blocks: int) -> None:
    """Let the architecture have so many blocks, with the kinds of its first ones."""
    config.num_hidden_layers = blocks
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:blocks]


def _auto_class(config: Any) -> Any:
    """AutoModelForCausalLM, or AutoModel where config.json names a model without a head (an encoder)."""
    from transformers import AutoModel, AutoModelForCausalLM

    headless: Any = AutoModel._model_mapping.get(type(config), None)
    if not isinstance(headless, type) or config.architectures != [headless.__name__]:
        return AutoModelForCausalLM
    return AutoModel


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers takes no memory."""

    def to_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return parameter
        empty: Any = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        empty._is_hf_initialized = True  # or transformers would draw numbers for it, into nothing
        return empty

    handle = register_module_parameter_registration_hook(to_meta)
    try:
        yield
    finally:
        handle.remove()


def _fill(model: Any, tensors: Tensors, place: Place, device: torch.device) -> None:
    """Set every parameter and persistent buffer of `model` from `tensors`."""
    slots = dict(model.named_parameters(remove_duplicate=False))
    shared: dict[int, list[str]] = {}  # parameters that are one object: tied weights
    for name, parameter in slots.items():
        shared.setdefault(id(parameter), []).append(name)
    saved = model.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    home = _match(model, tensors, slots, list(shared.values()), buffers)
    for group in shared.values():
        for names in _really_tied(group, home, tensors):
            dtype = torch.float32 if _stays_float32(model, names[0]) else slots[names[0]].dtype
            _set(model, names, place(names[0], tensors.read(home[names[0]]).to(dtype)).to(device))
    for name in buffers.keys() & home.keys():
        buffers[name].copy_(tensors.read(home[name]))
    for name, buffer in model.named_buffers():
        _owner(model, name)._buffers[name.rpartition(".")[2]] = buffer.to(device)


def _rearranged_by_transformers(model: Any) -> bool:
    """Whether transformers keeps this architecture's weights in another arrangement than its files (merged experts)."""
    from transformers import conversion_mapping

    known: Any = conversion_mapping.get_checkpoint_conversion_mapping
    return any(known(key) is not None for key in (type(model).__name__, model.config.model_type))


def _through_transformers(kind: Any, folder: Path, dtype: torch.dtype, place: Place, device: torch.device) -> Any:
    """Let transformers load and rearrange all weights, then place each; its peak is the model and its largest merge."""
    from veneer.models.attention import use_veneer_attention

    model, found = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True)
    use_veneer_attention(model)
    words = {"missing_keys": "needed by the model, not in the files", "unexpected_keys": "unknown to the model"}
    words |= {"mismatched_keys": "of another shape in the files"}
    if problems := [f"{name}: {text}" for key, text in words.items() for name in sorted(found[key])]:
        raise _misfit(model, problems)
    shared: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        shared.setdefault(id(parameter), []).append(name)
    for names in shared.values():
        _set(model, names, place(names[0], model.get_parameter(names[0]).detach()).to(device))
    return model.to(device)


def _set(model: nn.Module, names: list[str], tensor: Tensor) -> None:
    """Make `tensor` the one frozen parameter behind all these names."""
    parameter = nn.Parameter(tensor, requires_grad=False)
    for name in names:
        _owner(model, name)._parameters[name.rpartition(".")[2]] = parameter


def _misfit(model: Any, problems: list[str]) -> ModelError:
    listed = "\n".join(f"  {p}" for p in problems)
    return ModelError(
        f"the weights do not fit {type(model).__name__} as config.json describes it; {len(problems)} differ:\n"
        f"{listed}\nNothing was loaded. Weights and config.json must come from the same model."
    )


def _really_tied(group: list[str], home: dict[str, str], tensors: Tensors) -> list[list[str]]:
    """Split a group of tied names, one that is in the files first; names whose tensors differ there are not tied."""
    found = [name for name in group if name in home]
    absent = [name for name in group if name not in home]
    if len(found) == 1 or all(torch.equal(tensors.read(home[found[0]]), tensors.read(home[n])) for n in found[1:]):
        return [found + absent]
    return [[found[0], *absent], *([name] for name in found[1:])]


def _match(
    model: Any, tensors: Tensors, slots: dict[str, Tensor], groups: list[list[str]], buffers: dict[str, Tensor]
) -> dict[str, str]:
    """Parameter or buffer name -> tensor name; the base model's prefix may be there or not.

    Raises ModelError listing every tensor that is missing, left over or of another shape.
    """
    prefix = f"{model.base_model_prefix}."
    home = {}
    for name in [*slots, *buffers]:
        for candidate in (name, name.removeprefix(prefix), prefix + name):
            if candidate in tensors:
                home[name] = candidate
                break
    wanted = slots | buffers
    ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *OLD_BUFFERS]))
    lost = [group[0] for group in groups if home.keys().isdisjoint(group)]
    lost += [name for name in buffers if name not in home and not ignored.search(name)]
    missing = [f"{name}: needed by the model, not in the files" for name in lost]
    left = [n for n in tensors if n not in set(home.values()) and not ignored.search(n)]
    unexpected = [f"{name}: in the files, unknown to the model" for name in left]
    misfits = [
        f"{name}: {tensors[source].shape} in the files, {tuple(wanted[name].shape)} in the model"
        for name, source in home.items()
        if tensors[source].shape != tuple(wanted[name].shape)
    ]
    if problems := missing + unexpected + misfits:
        raise _misfit(model, problems)
    return home


def _stays_float32(model: Any, name: str) -> bool:
    patterns = set(model._keep_in_fp32_modules_strict or ())
    if model.config.dtype == torch.float16:
        patterns |= set(model._keep_in_fp32_modules or ())
    return any(re.search(rf"(^|\.){re.escape(p)}($|\.)", name) for p in patterns)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _set_generation(model: Any, folder: Path) -> None:
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and remarks off stderr, and put its settings back."""
    from transformers.utils import logging as untyped

    logging: Any = untyped
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
