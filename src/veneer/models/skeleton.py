"""The architecture of a model folder without its weights, and its tokenizer.

Parameters are on torch's meta device; buffers, such as the rotary frequencies, are computed by the model's own
constructors.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from veneer.errors import ModelError
from veneer.models.attention import use_veneer_attention


def build_skeleton(folder: Path, dtype: torch.dtype, *, blocks: int | None = None) -> Any:
    """The transformers model that config.json describes, without weights; the random state stays as it was.

    blocks    build only the first so many blocks
    Raises ModelError for an architecture that transformers does not build and for weights quantized by another library
    than bitsandbytes.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if (stored := getattr(config, "quantization_config", None)) is not None:
            by = dict(stored).get("quant_method", "a method it does not name")
            if by != "bitsandbytes":
                raise ModelError(
                    f"{folder} holds weights quantized by {by}; "
                    "give the model they were made from, and let veneer quantize it"
                )
            del config.quantization_config  # the model is dense until a storage is placed in it
        if blocks is not None:
            shorten_config(config.get_text_config(), blocks)
        with quiet(), _parameters_on_meta(), torch.random.fork_rng(devices=[]):
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


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, as transformers loads it."""
    from transformers import AutoTokenizer

    with quiet():
        try:
            return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"{folder}: the tokenizer does not load: {error}") from error


def set_generation_config(model: Any, folder: Path) -> None:
    """Give the model the generation settings of its folder, if there are any."""
    from transformers import GenerationConfig

    if model.can_generate() and (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, transformers prints neither progress bars nor remarks; its settings are restored afterwards."""
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


def shorten_config(config: Any, blocks: int) -> None:
    """Describe only the first `blocks` blocks; more than there are repeat the last."""
    config.num_hidden_layers = blocks
    if types := getattr(config, "layer_types", None):
        config.layer_types = [*types, *[types[-1]] * blocks][:blocks]


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
