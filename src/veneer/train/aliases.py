"""Names that users bring from PEFT, TRL, Axolotl and others, and what they are called here.

A name whose meaning differs here is refused with what to write instead, rather than read wrongly.
"""

from typing import Any

from veneer.errors import ConfigError

SAME_MEANING = {
    "base_model": "model",
    "model_name_or_path": "model",
    "output_dir": "run",
    "adapter": "method.name",
    "finetuning_type": "method.name",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "use_rslora": "method.rank_stabilized",
    "rank_pattern": "method.rank_pattern",
    "alpha_pattern": "method.alpha_pattern",
    "target_modules": "method.targets",
    "lora_target_modules": "method.targets",
    "exclude_modules": "method.exclude",
    "layers_to_transform": "method.layers",
    "learning_rate": "optimizer.lr",
    "weight_decay": "optimizer.weight_decay",
    "loraplus_lr_ratio": "optimizer.lr_ratio",
    "max_steps": "train.steps",
    "iters": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "epochs": "train.epochs",
    "steps": "train.steps",
    "max_length": "train.max_length",
    "max_seq_length": "train.max_length",
    "sequence_len": "train.max_length",
    "cutoff_len": "train.max_length",
    "lr_scheduler_type": "train.schedule",
    "lr_scheduler": "train.schedule",
    "warmup_steps": "train.warmup",
    "warmup_ratio": "train.warmup",
    "max_grad_norm": "train.clip",
    "gradient_checkpointing": "train.recompute",
    "eval_steps": "train.eval_every",
    "save_steps": "train.checkpoint_every",
    "save_total_limit": "train.keep_checkpoints",
    "seed": "train.seed",
    "packing": "data.packing",
    "sample_packing": "data.packing",
    "train_file": "data.train",
    "dataset_name": "data.train",
    "eval_file": "data.eval",
}

_IN_TOKENS = "batches are counted in tokens here: set train.tokens_per_step (rows x their mean length)"
OTHER_MEANING = {
    "per_device_train_batch_size": _IN_TOKENS,
    "micro_batch_size": _IN_TOKENS,
    "batch_size": _IN_TOKENS,
    "gradient_accumulation_steps": _IN_TOKENS,
    "train_on_inputs": "prompts are never trained; to train on whole texts use rows with one `text` column",
    "bf16": "the compute dtype is measured; to choose it set train.dtype",
    "fp16": "float16 does not train here; set train.dtype to bfloat16 or float32",
    "optim": "set optimizer.name",
    "scale": "veneer's scale is alpha / rank; set method.alpha to scale x rank",
}


def canonical(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The recipe with every alias under its own name, and which alias became what.

    Raises ConfigError when a name means something else here, or when an alias and its own name are both given.
    """
    recipe: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    for key, value in given.items():
        if key in OTHER_MEANING:
            raise ConfigError(f"{key}: {OTHER_MEANING[key]}")
        if key not in SAME_MEANING or (key == "adapter" and not isinstance(value, str)):
            _put(recipe, key, value, key)
        else:
            renamed[key] = SAME_MEANING[key]
            _put(recipe, SAME_MEANING[key], value, key)
    return recipe, renamed


def _put(recipe: dict[str, Any], dotted: str, value: Any, given_as: str) -> None:
    section, _, leaf = dotted.rpartition(".")
    place = recipe.setdefault(section, {}) if section else recipe
    if section == "method" and isinstance(place, str):
        place = recipe[section] = {"name": place}
    if not isinstance(place, dict):
        raise ConfigError(f"{given_as} sets {dotted}, but {section} is given as {place!r}")
    if isinstance(value, dict) and isinstance(place.get(leaf), dict):
        for k, v in value.items():
            _put(recipe, f"{dotted}.{k}", v, f"{given_as}.{k}")
        return
    if leaf in place and place[leaf] != value:
        raise ConfigError(f"{dotted} is given twice: {place[leaf]!r}, and {value!r} as {given_as}")
    place[leaf] = value
