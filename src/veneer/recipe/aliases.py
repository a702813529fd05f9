"""Names that users bring from PEFT, TRL, Axolotl and others, and what they are called here.

A name whose meaning differs here is refused with what to write instead, rather than read wrongly.
"""

from collections.abc import Mapping
from reprlib import repr as repr_of
from typing import Any

_ALIASES = {
    "model": ("base_model", "model_name_or_path"),
    "run": ("output_dir",),
    "method.name": ("adapter", "finetuning_type"),
    "method.rank": ("lora_r", "lora_rank"),
    "method.alpha": ("lora_alpha",),
    "method.dropout": ("lora_dropout",),
    "method.rank_stabilized": ("use_rslora",),
    "method.rank_pattern": ("rank_pattern",),
    "method.alpha_pattern": ("alpha_pattern",),
    "method.init": ("init_lora_weights",),
    "method.targets": ("target_modules", "lora_target_modules"),
    "method.exclude": ("exclude_modules",),
    "method.layers": ("layers_to_transform",),
    "method.trained_modules": ("modules_to_save", "lora_modules_to_save"),
    "tokens.train": ("trainable_token_indices",),
    "prompt.tokens": ("num_virtual_tokens",),
    "optimizer.lr": ("learning_rate",),
    "optimizer.weight_decay": ("weight_decay",),
    "optimizer.lr_ratio": ("loraplus_lr_ratio",),
    "optimizer.lr_embedding": ("loraplus_lr_embedding",),
    "storage.name": ("bnb_4bit_quant_type",),
    "storage.double_quant": ("bnb_4bit_use_double_quant",),
    "train.steps": ("max_steps", "iters", "steps"),
    "train.epochs": ("num_train_epochs", "num_epochs", "epochs"),
    "train.max_length": ("max_length", "max_seq_length", "sequence_len", "cutoff_len"),
    "train.schedule": ("lr_scheduler_type", "lr_scheduler"),
    "restarts.every": ("relora_steps", "jagged_restart_steps"),
    "restarts.warmup": ("jagged_restart_warmup_steps",),
    "train.warmup": ("warmup_steps", "warmup_ratio"),
    "train.clip": ("max_grad_norm",),
    "train.recompute": ("gradient_checkpointing",),
    "train.eval_every": ("eval_steps",),
    "train.checkpoint_every": ("save_steps",),
    "train.keep_checkpoints": ("save_total_limit",),
    "train.seed": ("seed",),
    "data.packing": ("packing", "sample_packing"),
    "data.train": ("train_file", "dataset_name"),
    "data.eval": ("eval_file",),
}
SAME_MEANING = {alias: own for own, aliases in _ALIASES.items() for alias in aliases}

_IN_TOKENS = "batches are counted in tokens here: set train.tokens_per_step (rows x their mean length)"
OTHER_MEANING = {
    "per_device_train_batch_size": _IN_TOKENS,
    "micro_batch_size": _IN_TOKENS,
    "batch_size": _IN_TOKENS,
    "gradient_accumulation_steps": _IN_TOKENS,
    "train_on_inputs": "prompts are never trained; to train on whole texts use rows with one `text` column",
    "bf16": "the compute dtype is measured; to choose it set train.dtype",
    "fp16": "float16 does not train here; set train.dtype to bfloat16 or float32",
    "bnb_4bit_compute_dtype": "the compute dtype is measured; to choose it set train.dtype",
    "optim": "set optimizer.name",
    "added_tokens_overrides": "tokens are added at the end of the vocabulary: list their texts in tokens.add",
    "relora": "set restarts.every to the steps of a cycle",
    "relora_prune_method": "set restarts.reset to magnitude, random or zero",
    "relora_prune_ratio": "set restarts.keep to what is left: 1 - the ratio",
    "scale": "veneer's scale is alpha / rank; set method.alpha to scale x rank",
}


SWITCHES = {"load_in_4bit": ("nf4", "fp4"), "load_in_8bit": ("int8",)}
"""Names that are true or false -> the storages that they mean when true, the usual one first."""

LORA_INITS = {"pissa": ("iterations",), "eva": ("most", "look")}
"""Inits of lora that were methods in earlier recipes, with the settings they had: `method: pissa` is still accepted."""

SECTIONS = ("storage", "method", "tokens", "prompt", "data", "optimizer", "restarts", "train", "memory")
SHORTHANDS = ("storage", "method", "prompt", "optimizer")
"""Sections that may be given as a bare name: `method: lora`."""

AUTO = ("memory.auto", True)
"""What `memory: auto` means."""

Problem = tuple[str, str]
"""A key as it was given, and the message about it."""


def canonical(given: Mapping[Any, Any]) -> tuple[dict[Any, Any], list[Problem]]:
    """The recipe in sections, aliases under their own names, and its names of other meaning or with two values."""
    recipe: dict[Any, Any] = {}
    problems: list[Problem] = []
    for key, value in given.items():
        if key in OTHER_MEANING:
            problems.append((str(key), f"{key}: {OTHER_MEANING[key]}"))
            continue
        if key in SWITCHES:
            continue
        for dotted, leaf in _leaves(own_name(key, value), value):
            before = put(recipe, dotted, leaf)
            if before is not None:
                problems.append((str(key), f"{dotted} is given twice: {before}, and {repr_of(leaf)} as {key}"))
    return recipe, [*problems, *_switched(recipe, given)]


def _switched(recipe: dict[Any, Any], given: Mapping[Any, Any]) -> list[Problem]:
    """Set the storage that a switch means, unless it is named elsewhere; what contradicts the switch."""
    problems = []
    for key, meant in SWITCHES.items():
        if key not in given:
            continue
        storage = recipe.get("storage", {})
        name = storage.get("name") if isinstance(storage, dict) else storage
        if not isinstance(given[key], bool):
            problems.append((key, f"{key} is {repr_of(given[key])}, true or false is needed"))
        elif given[key] and name is None:
            put(recipe, "storage.name", meant[0])
        elif name is not None and given[key] != (name in meant):
            problems.append((key, f"{key} is {str(given[key]).lower()}, but storage.name is {repr_of(name)}"))
    return problems


def inits(recipe: Mapping[Any, Any]) -> list[Problem]:
    """Write a method that is an init of lora now, and an init by PEFT's name, canonically; what contradicts them."""
    from veneer.methods.init.base import init_setting  # not at import: brings torch

    method = recipe.get("method")
    if not isinstance(method, dict):
        return []
    name, problems = method.get("name"), []
    if isinstance(name, str) and name in LORA_INITS:
        if method.get("init", "uniform") not in ("uniform", name):
            other = repr_of(method["init"])
            problems.append(("method.init", f"method {name} is lora with init {name}, but method.init is {other}"))
        new, settings = as_init(name, method)
        method.clear()
        method.update(settings, name=new)
    if "init" in method:
        method["init"] = init_setting(method["init"])
    return problems


def as_init(method: str, settings: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A method's name and settings, where pissa and eva become inits of lora."""
    if method not in LORA_INITS:
        return method, dict(settings)
    own = {key: settings[key] for key in LORA_INITS[method] if key in settings}
    return "lora", {**{k: v for k, v in settings.items() if k not in own}, "init": {"name": method, **own}}


def switch(recipe: dict[Any, Any], key: str, flags: Mapping[str, Any]) -> list[Problem]:
    """Let a switch among the flags outrank the recipe's storage; another flag that names a storage must agree."""
    on, meant = flags[key], SWITCHES[key]
    given = [v for k, v in flags.items() if k == "storage" or own_name(k) == "storage.name"]
    named = [v.get("name") if isinstance(v, Mapping) else v for v in given]
    named += [SWITCHES[k][0] for k in SWITCHES if k != key and flags.get(k) is True]
    storage = recipe.get("storage", {})
    name = storage.get("name") if isinstance(storage, dict) else storage
    if not isinstance(on, bool):
        return [(key, f"{key} is {repr_of(on)}, true or false is needed")]
    if named:
        clash = on != (named[-1] in meant)
        return [(key, f"{key} is {str(on).lower()}, but storage.name is {repr_of(named[-1])}")] if clash else []
    if on != (name in meant):
        recipe["storage"] = {"name": meant[0] if on else "dense"}
    return []


def own_name(key: Any, value: Any = "") -> Any:
    """The dotted name of a key or of an alias; `adapter` is one only with a method's name, others put more there."""
    return key if key == "adapter" and not isinstance(value, str) else SAME_MEANING.get(key, key)


def put(recipe: dict[Any, Any], dotted: Any, value: Any, *, outrank: bool = False) -> str | None:
    """Set one key; returns an earlier value, which stays unless `outrank`."""
    inside = isinstance(dotted, str) and dotted.partition(".")[0] in SECTIONS
    *sections, leaf = dotted.split(".") if inside else [dotted]
    place: Any = recipe
    for section in sections:
        if section == "init" and isinstance(place.get(section), str):
            place[section] = {"name": place[section]}
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            return f"{section} is {repr_of(place)}"
    if not outrank and leaf in place and place[leaf] != value:
        return repr_of(place[leaf])
    place[leaf] = value
    return None


def _leaves(key: Any, value: Any) -> list[tuple[Any, Any]]:
    """The keys inside a section, so that they can be told from those given as aliases."""
    if key not in SECTIONS:
        return [(key, value)]
    if (key, value) == ("memory", "auto"):
        return [AUTO]
    if isinstance(value, str) and key in SHORTHANDS:
        return [(f"{key}.name", value)]
    if isinstance(value, list) and key == "tokens":
        return [("tokens.add", value)]
    if isinstance(value, Mapping) and all(isinstance(k, str) and "." not in k for k in value):
        return [(f"{key}.{k}", v) for k, v in value.items()]
    return [(key, value)]
