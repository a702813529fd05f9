"""Preflight: everything that can be wrong with a recipe, found before any weight is read.

The checks run on one model on torch's meta device, with the adapter attached to it.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.adapters.targets import Targeting, all_matching
from veneer.base.base import Base
from veneer.base.device import find_device
from veneer.base.load import FOUR_BITS, refuse_paging
from veneer.base.memory_tracker import MemoryTracker
from veneer.base.meta import Untraceable, meta_base, traceable
from veneer.base.storage_config import BaseStorage, base_storage, computed_by_kernels
from veneer.disk.scratch import refuse_memory
from veneer.errors import ConfigError
from veneer.methods.base import MethodConfig, config_from
from veneer.models.sources import resolve
from veneer.prompts.base import PromptConfig
from veneer.prompts.base import config_from as prompt_config
from veneer.recipe.settings import NONE, MethodSettings, Recipe
from veneer.train.activation_checkpointing import chosen_blocks
from veneer.train.job import Job
from veneer.train.optim.adamw import refuse_idle_bits, refuse_paged_state
from veneer.train.optim.param_groups import parameter_groups
from veneer.train.optim.step_in_backward import check_in_backward
from veneer.train.restarts import check_restarts

EIGHT_BITS = "8-bit AdamW"


@dataclass(frozen=True)
class InitState:
    """What a method settled from data before training; a resumed run takes it from the checkpoint."""

    config: MethodConfig
    paths: list[str]


@dataclass(frozen=True)
class Checked:
    """A job in which nothing wrong was found, with its model on the meta device."""

    job: Job
    meta: Base
    """Without the adapter."""
    adapter_or_why: Adapter | Untraceable
    """The adapter, detached, or why it cannot be made without weights."""

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe

    @property
    def adapter(self) -> Adapter:
        """The adapter on the meta device, detached.  Raises Untraceable if it cannot be made there."""
        if isinstance(self.adapter_or_why, Untraceable):
            raise self.adapter_or_why
        return self.adapter_or_why

    @property
    def storage(self) -> BaseStorage | None:
        """How linear layers are stored: as the recipe says, or as a quantized folder has them."""
        return base_storage(self.recipe.storage.model_dump()) or self.meta.storage

    @property
    def by_kernels(self) -> str | None:
        """What veneer's C library would compute in this run; None for nothing."""
        if not find_device(self.recipe.device).is_cpu:
            return None
        if computed_by_kernels(self.storage):
            return FOUR_BITS
        return EIGHT_BITS if self.recipe.optimizer.bits == 8 else None


def preflight(job: Job, init: InitState | None = None, earlier: Checked | None = None) -> Checked:
    """Check the whole recipe on a meta model, built here.

    init      of the run that is resumed, if its method looked at data
    earlier   the same job with other settings of training: its meta model and adapter are used again
    Raises ConfigError, ModelError, TargetError and DiskError, as training would after loading.  A model that cannot be
    traced without data passes: its `adapter` then says why.
    """
    recipe = job.recipe
    meta, made = _on_meta(job, init) if earlier is None else (earlier.meta, earlier.adapter_or_why)
    checked = Checked(job, meta, made)
    check_lengths(job, meta)
    _check_paging(recipe, meta, checked.storage)
    chosen_blocks(meta, recipe.train.recompute)
    if not isinstance(made, Untraceable):
        check_adapter(job, made)
    return checked


def check_lengths(job: Job, base: Base) -> None:
    """Raise ConfigError if a row, with the prompt's virtual tokens in front, is longer than the base can read."""
    own, most = job.recipe.prompt, base.max_positions
    front = 0 if own.name == NONE else prompt_config(own.name, own.own).tokens
    longest = max([*job.examples, *job.held_out], key=len)
    if most is not None and len(longest) + front > most:
        prompt = f" and {front} of the prompt in front" if front else ""
        raise ConfigError(
            f"{longest.source}:{longest.line} has {len(longest)} tokens{prompt}, but the model reads at most {most}; "
            f"set train.max_length to {most - front} or less"
        )


def check_adapter(job: Job, adapter: Adapter) -> None:
    """Raise ConfigError if restarts, the optimizer or stepping in the backward pass do not go with the adapter."""
    recipe = job.recipe
    check_restarts(recipe, adapter, len(job.steps))
    check_in_backward(recipe, adapter, job.steps)
    refuse_idle_bits(parameter_groups(adapter.named(), recipe.optimizer), recipe.optimizer)


def targeting_of(method: MethodSettings) -> Targeting:
    """The targets of the recipe's method."""
    return Targeting(targets=method.targets, exclude=method.exclude, layers=method.layers)


def configs_of(recipe: Recipe, init: InitState | None = None) -> tuple[MethodConfig | None, PromptConfig | None]:
    """The settings of the recipe's method, as they were settled from data if they were, and of its prompt."""
    method, prompt = recipe.method, recipe.prompt
    config = None if method.name == NONE else init.config if init else config_from(method.name, method.own)
    return config, None if prompt.name == NONE else prompt_config(prompt.name, prompt.own)


def attach_without_data(
    base: Base, recipe: Recipe, targeting: Targeting | None = None, init: InitState | None = None
) -> Adapter:
    """Attach the recipe's adapter to a base on the meta device or with synthetic weights.

    A method that starts from the inputs of its layers does not look at any.
    targeting   where the method applies; None is as the recipe says, else in a model with fewer blocks
    """
    (config, prompt), where = configs_of(recipe, init), targeting or targeting_of(recipe.method)
    modules = recipe.method.trained_modules
    if targeting is not None:
        modules = tuple(name for name in modules if all_matching(base.network, (name,)))
    with traceable(recipe.model), MemoryTracker():
        return attach(
            base,
            config,
            where,
            prompt=prompt,
            trained_modules=modules,
            new_tokens=recipe.tokens.add,
            trained_tokens=recipe.tokens.train,
            begun=[] if init is None else init.paths,
        )


def _on_meta(job: Job, init: InitState | None) -> tuple[Base, Adapter | Untraceable]:
    """The model on the meta device and its adapter, which is attached only for a moment: a detached base can be copied.

    Raises ModelError for a model that the task cannot be learned on or that takes no prompt, TargetError or ConfigError
    if the method does not fit its targets.
    """
    recipe, problem = job.recipe, None
    folder, dtype = resolve(recipe.model), find_device(recipe.device).dtype(recipe.train.dtype)
    try:
        meta = meta_base(folder, dtype, base_storage(recipe.storage.model_dump()), name=recipe.model)
    except Untraceable as error:
        meta, problem = meta_base(folder, dtype, name=recipe.model), error
    meta = replace(meta, tokenizer=job.tokenizer)
    asked = {"method": recipe.method.name, "prompt": recipe.prompt.name}
    job.task.refuse_base(meta, " and ".join(f"{kind} {name}" for kind, name in asked.items() if name != NONE))
    try:
        adapter = attach_without_data(meta, recipe, init=init).detach()
    except Untraceable as error:
        return meta, error
    return meta, problem or adapter


def _check_paging(recipe: Recipe, meta: Base, storage: BaseStorage | None) -> None:
    """Raise ConfigError or DiskError if something would be paged into memory, or weights that cannot be paged."""
    run, device = Path(recipe.run), find_device(recipe.device)
    if recipe.memory.page_weights:
        refuse_paging(recipe.model, meta.files, storage, device)
    if recipe.memory.page_activations:
        refuse_memory(run, "memory.page_activations", "put the run on a disk")
    if recipe.optimizer.paged is True:
        refuse_paged_state(device)
        refuse_memory(run, "optimizer.paged", "put the run on a disk")
