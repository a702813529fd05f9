"""From a job to a training: load its base and attach its adapter."""

from dataclasses import dataclass

from veneer.adapters.adapter import Adapter
from veneer.adapters.attach import attach
from veneer.base.base import Base
from veneer.base.load import load_model
from veneer.base.storage_config import computed_by_kernels
from veneer.kernels import native
from veneer.train.init_pass import init_pass
from veneer.train.job import Job, Say
from veneer.train.preflight import EIGHT_BITS, Checked, InitState, configs_of, targeting_of


@dataclass(frozen=True)
class Training:
    """A job with its weights: the base in memory and the adapter attached to it."""

    job: Job
    base: Base
    adapter: Adapter


def set_up(checked: Checked, init: InitState | None = None, say: Say = lambda _: None) -> Training:
    """Load the base and attach the recipe's adapter, dropout off; `init` is that of a resumed run, if any."""
    job, recipe = checked.job, checked.recipe
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
    return Training(job, base, attach_parts(base, job, init))


def attach_parts(base: Base, job: Job, init: InitState | None = None) -> Adapter:
    """Attach the recipe's method, its prompt, or both, dropout off."""
    config, prompt = configs_of(job.recipe, init)
    tokens = 0 if config is None or config.data_init is None else config.data_init.look
    return attach(
        base,
        config,
        targeting_of(job.recipe.method),
        prompt=prompt,
        trained_modules=job.recipe.method.trained_modules,
        new_tokens=job.recipe.tokens.add,
        trained_tokens=job.recipe.tokens.train,
        seed=job.recipe.train.seed,
        look=init_pass(base, job, tokens),
        begun=None if init is None else init.paths,
    ).eval()
