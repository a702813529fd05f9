"""From a job to a training: load its base and attach its adapter."""

from dataclasses import dataclass

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.adapters.targets import Targeting
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.base.storage_config import computed_by_kernels
from veneer.errors import ConfigError
from veneer.kernels import native
from veneer.methods.base import MethodConfig, config_from
from veneer.prompts.base import config_from as prompt_config
from veneer.recipe.settings import NONE
from veneer.train.compatibility import targeting_of
from veneer.train.init_pass import init_pass
from veneer.train.job import Job, Say
from veneer.train.optim.step_in_backward import check_in_backward
from veneer.train.restarts import check_restarts

EIGHT_BITS = "8-bit AdamW"


@dataclass(frozen=True)
class InitState:
    """What a method settled from data before training; a resumed run takes it from the checkpoint."""

    config: MethodConfig
    paths: list[str]


@dataclass(frozen=True)
class Training:
    """A job with its weights: the base in memory and the adapter attached to it."""

    job: Job
    base: Base
    adapter: Adapter


def set_up(job: Job, init: InitState | None = None, say: Say = lambda _: None) -> Training:
    """Load the base and attach the recipe's adapter, dropout off.

    init    of the run that is resumed, if its method looked at data
    """
    recipe = job.recipe
    say(f"loading {recipe.model}")
    base = load_model(
        recipe.model,
        storage=recipe.storage.model_dump(),
        device=recipe.device,
        dtype=recipe.train.dtype,
        paged=recipe.memory.page_weights,
        say=say,
    )
    if recipe.optimizer.bits == 8 and base.device.is_cpu and not computed_by_kernels(base.storage):
        native.say_without(EIGHT_BITS, say)  # with 4-bit weights it was said
    check_lengths(job, base)
    adapter = attach_parts(base, job, init)
    refuse_unsuited(job, adapter)
    return Training(job, base, adapter)


def attach_parts(base: Base, job: Job, init: InitState | None = None) -> Adapter:
    """Attach the recipe's method, its prompt, or both, dropout off."""
    method, prompt = job.recipe.method, job.recipe.prompt
    config = None if method.name == NONE else config_from(method.name, method.own) if init is None else init.config
    tokens = 0 if config is None or config.data_init is None else config.data_init.look
    return attach(
        base,
        config,
        Targeting() if config is None else targeting_of(method),
        prompt=None if prompt.name == NONE else prompt_config(prompt.name, prompt.own),
        seed=job.recipe.train.seed,
        look=init_pass(base, job, tokens),
        begun=None if init is None else init.paths,
    ).eval()


def check_lengths(job: Job, base: Base) -> None:
    """Raise ConfigError if a row, with the prompt's virtual tokens before it, is longer than the base can read."""
    recipe, most = job.recipe, base.max_positions
    front = 0 if recipe.prompt.name == NONE else prompt_config(recipe.prompt.name, recipe.prompt.own).tokens
    longest = max([*job.examples, *job.held_out], key=len)
    if most is not None and len(longest) + front > most:
        prompt = f" and {front} of the prompt in front" if front else ""
        raise ConfigError(
            f"{longest.source}:{longest.line} has {len(longest)} tokens{prompt}, but the model reads at most {most}; "
            f"set train.max_length to {most - front} or less"
        )


def refuse_unsuited(job: Job, adapter: Adapter) -> None:
    """Raise ConfigError where restarts or stepping in the backward pass do not go with the adapter."""
    check_restarts(job.recipe, adapter, len(job.steps))
    check_in_backward(job.recipe, adapter, job.steps)
