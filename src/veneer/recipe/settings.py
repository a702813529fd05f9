"""The sections of a recipe and their defaults; the line under a field is its help text, its unit and its range."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from veneer.data.settings import DataSettings
from veneer.errors import ConfigError
from veneer.units import parse_bytes

NONE = "none"
"""The name that stands for no method, or no prompt."""

LEFT_OUT = ("task", "device")
"""Keys that runs of earlier versions lack; `Recipe.tree` leaves them out at their defaults, so that those resume."""

Share = Annotated[float, Field(ge=0, lt=1)]


class Section(BaseModel):
    """A part of a recipe: immutable, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)


class StorageSettings(BaseModel):
    """How the frozen weights are kept: the storage's name, its own settings (`veneer list storages`), and where."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str = "dense"
    """dense (as the files have them), nf4, fp4 or int8."""
    head: bool = False
    """Keep the output head in it too."""
    embeddings: bool = False
    """Keep the input embedding in it too, with the head where both are one weight."""
    backend: Literal["auto", "veneer", "bitsandbytes"] = "auto"
    """Whose 4-bit kernels compute: auto is bitsandbytes on CUDA, veneer's elsewhere."""


class NamedSettings(BaseModel):
    """Something registered by name, with its own settings beside."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    @property
    def own(self) -> dict[str, Any]:
        """The settings that belong to the thing itself."""
        return dict(self.model_extra or {})


class MethodSettings(NamedSettings):
    """How layers change: the method's name, its own settings (`veneer list methods`), and where it applies."""

    name: str = "lora"
    """Which method, e.g. lora; none for a prompt alone, which is also the default where only a prompt is given."""
    targets: str | tuple[str, ...] = "all-linear"
    """all-linear, a regular expression for whole module paths, or a list of path endings."""
    exclude: str | tuple[str, ...] = ()
    """Modules to leave out: a regular expression or a list of path endings."""
    layers: tuple[int, ...] = ()
    """Only these block numbers; empty for all."""
    trained_modules: tuple[str, ...] = ()
    """Path endings of modules that are trained in full beside the method, like lm_head or norm; they get no delta."""


class TokenSettings(Section):
    """Tokens whose rows in the embedding and the output head are trained beside the method."""

    add: tuple[str, ...] = ()
    """New tokens: the tokenizer knows each as one, the vocabulary grows by them, and their rows start at the mean."""
    train: tuple[int | str, ...] | Mapping[str, tuple[int | str, ...]] = ()
    """Known tokens, as ids or text: a list for the embedding and a head tied to it, or lists by module, such as
    {embed_tokens: [5, 7], lm_head: [5, 7]}."""


class PromptSettings(NamedSettings):
    """What is trained in front of the tokens, with a method or alone: its name and own settings."""

    name: str = NONE
    """prompt (prompt tuning), prefix (prefix tuning) or none."""


class OptimizerSettings(Section):
    """How parameters step."""

    name: Literal["adamw", "lion", "sgd", "adafactor"] = "adamw"
    """adamw, lion (needs `veneer[lion]`), sgd or adafactor. Settings that only others have are refused."""
    bits: Literal[32, 8] = 32
    """Bits of each number of the optimizer's state; 8 quarters its memory. Biases and scales keep 32."""
    paged: bool | Literal["auto"] = "auto"
    """Page the state to disk; it stays in memory while there is room. auto pages a state larger than half of the free
    memory. CPU only."""
    in_backward: bool = False
    """Step each parameter when its gradient is complete and keep no gradients; a step is then one micro-batch. With
    train.clip above 0 every step is computed twice, first for the norm alone; with clip 0 it costs nothing."""
    lr: Annotated[float, Field(gt=0)] = 2e-4
    """Learning rate at the schedule's top."""
    lr_ratio: Annotated[float, Field(gt=0)] = 1.0
    """Learning rate of "out" factors (LoRA's B) over that of the others; above 1 it is LoRA+ (arXiv:2402.12354)."""
    lr_embedding: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of all that changes a token embedding, whatever its role; absent, roles decide there too."""
    lr_prompt: Annotated[float, Field(gt=0)] | None = None
    """Learning rate of a prompt beside a method: prompts learn at 10 to 1000 times a method's; lr if absent."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of matrices; biases and scales are never decayed."""
    betas: tuple[Share, Share] | None = None
    """Decay of the moments, each in [0, 1); (0.9, 0.999) if absent, for lion (0.9, 0.99)."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the second moment."""
    momentum: Share = 0.0
    """Of sgd, in [0, 1)."""

    @model_validator(mode="after")
    def _of_this_optimizer(self) -> "OptimizerSettings":
        others = {
            "adamw": ("momentum",),
            "lion": ("bits", "paged", "in_backward", "eps", "momentum"),
            "sgd": ("bits", "paged", "in_backward", "betas", "eps", "weight_decay"),
            "adafactor": ("bits", "paged", "in_backward", "betas", "eps", "momentum"),
        }
        given = [k for k in others[self.name] if getattr(self, k) != type(self).model_fields[k].default]
        if given and not (given == ["paged"] and self.paged is False):
            raise ConfigError(f"optimizer.{given[0]} is given, but {self.name} does not have it; leave it out")
        return self


class TrainSettings(Section):
    """How long, in what batches, and what is written on the way."""

    steps: Annotated[int, Field(ge=1)] | None = None
    """Optimizer steps; give this or epochs."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over the rows; 1 if neither this nor steps is given."""
    tokens_per_step: Annotated[int, Field(ge=1)] = 4096
    """Tokens whose gradients are summed for one optimizer step."""
    micro_batch_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens in one forward pass; if absent 2048, or max_length where that is larger."""
    max_length: Annotated[int, Field(ge=2)] = 1024
    """Most tokens in one row."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rate falls after the warm-up."""
    warmup: Annotated[float, Field(ge=0)] = 0.03
    """Steps over which the learning rate rises; below 1 a share of all steps."""
    floor: Share = 0.0
    """Where the schedule ends, as a share of the learning rate, in [0, 1)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Largest norm of the whole gradient; 0 for no limit."""
    recompute: bool | Annotated[int, Field(ge=1)] | tuple[int, ...] = False
    """Recompute activations in the backward pass, less memory for up to a third more time: true for all blocks, a
    number for that many first blocks, a list for the blocks of these numbers (counted from 0)."""
    eval_every: Annotated[int, Field(ge=0)] = 0
    """Steps between measurements of the evaluation loss; 0 for one at the end (when data.eval is given)."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0 for none but the one written when interrupted."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 1
    """How many of the newest checkpoints stay."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Compute dtype of the frozen model; auto measures which is faster here."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seeds the adapter's start, the order of rows, and dropout; from 0 to 2**63 - 1."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSettings":
        if self.steps is not None and self.epochs is not None:
            raise ConfigError(f"give train.steps ({self.steps}) or train.epochs ({self.epochs}), not both")
        if self.floor and self.schedule == "constant":
            raise ConfigError(f"train.floor is {self.floor}, but schedule constant does not fall; leave it out")
        return self


class MemorySettings(Section):
    """How much memory there is, and what is paged to disk; paging gives the same result, bit for bit."""

    budget: str | int | None = None
    """Most memory the run may take, like 6GiB; if absent, or if that is less, what machine and cgroup have left."""
    auto: bool = False
    """Where the run would not fit, make the change that costs least and fits: smaller portions, recomputing, 8-bit
    state, 4-bit weights, paging. `memory: auto` is short for it; the change is reported and written to the run's
    recipe."""
    page_weights: bool = False
    """Read the quantized weights of the model's blocks from disk ahead of each use; needs train.recompute."""
    page_activations: bool = False
    """Keep the inputs of recomputed blocks on disk between forward and backward pass; needs train.recompute."""


class RestartSettings(Section):
    """Fold the change into the frozen weights every so often and begin a new one: ReLoRA; with mora, ReMoRA."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps of a cycle, after which comes a restart; 0 for none."""
    first: Annotated[int, Field(ge=1)] | None = None
    """Steps before the first restart; if absent as many as `every`."""
    warmup: Annotated[float, Field(ge=0)] = 0.1
    """Steps over which the learning rate rises again after a restart; below 1 a share of `every`."""
    reset: Literal["zero", "random", "magnitude", "none"] = "zero"
    """What becomes of the optimizer's moments: all zero; a random share or the largest are kept; none: all kept."""
    keep: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Share of the moments that random and magnitude keep, in (0, 1); if absent 0.1."""
    fold: Literal["auto", "weight", "beside"] = "auto"
    """Where finished cycles go: into the weight, which is put back at the end, or beside it as a growing low-rank term;
    auto: into weights that are dense and belong to one layer only."""

    @model_validator(mode="after")
    def _consistent(self) -> "RestartSettings":
        given = [k for k, v in self.model_dump().items() if k != "every" and v != type(self).model_fields[k].default]
        if given and not self.every:
            raise ConfigError(f"restarts.{given[0]} is given, but there are no restarts: set restarts.every")
        if self.keep is not None and self.reset not in ("random", "magnitude"):
            raise ConfigError(
                f"restarts.keep belongs to reset random and magnitude, but restarts.reset is {self.reset}"
            )
        if self.every and self.warmup_steps > self.every:
            raise ConfigError(
                f"restarts.warmup {self.warmup:g} is longer than a cycle (restarts.every {self.every}); lower it"
            )
        return self

    @property
    def warmup_steps(self) -> int:
        """`warmup` in steps."""
        return round(self.warmup * self.every) if self.warmup < 1 else round(self.warmup)


def _name(section: Any) -> Any:
    """The name that a section, as somebody wrote it, gives."""
    return section.get("name") if isinstance(section, Mapping) else getattr(section, "name", None)


class Recipe(Section):
    """A whole training job."""

    model: str
    """The frozen base: an alias, a hub id, a folder or a .gguf file."""
    data: DataSettings
    """The rows to learn from."""
    run: str
    """The folder that the run is written to."""
    storage: StorageSettings = StorageSettings()
    """How the frozen weights are kept."""
    method: MethodSettings = MethodSettings()
    """How layers change."""
    tokens: TokenSettings = TokenSettings()
    """Tokens whose rows are trained; a list is that of the new ones."""
    prompt: PromptSettings = PromptSettings()
    """What is trained in front of the tokens."""
    optimizer: OptimizerSettings = OptimizerSettings()
    """How parameters step."""
    restarts: RestartSettings = RestartSettings()
    """Fold the change into the frozen weights every few steps and begin a new one."""
    train: TrainSettings = TrainSettings()
    """How long, in what batches, and what is written on the way."""
    memory: MemorySettings = MemorySettings()
    """What is kept on disk between its uses."""
    task: str = "causal-lm"
    """What is learned: causal-lm, the next token."""
    device: str = "auto"
    """Where the model computes: auto (CUDA if there is any, else the CPU), cpu, cuda, cuda:N or mps."""

    def tree(self) -> dict[str, Any]:
        """The recipe as plain data, as it is written to disk."""
        kept = self.model_dump(mode="json")
        return {k: v for k, v in kept.items() if k not in LEFT_OUT or v != type(self).model_fields[k].default}

    @property
    def lean(self) -> bool:
        """Whether something here gives time for memory already."""
        paged = self.memory.page_weights or self.memory.page_activations
        return self.train.recompute is not False or paged or self.optimizer.in_backward

    @model_validator(mode="before")
    @classmethod
    def _prompt_alone(cls, given: Any) -> Any:
        """A prompt that is given without any word about a method is trained alone."""
        if not isinstance(given, Mapping) or "method" in given or _name(given.get("prompt")) in (None, NONE):
            return given
        return {**given, "method": {"name": NONE}}

    @model_validator(mode="after")
    def _what_is_asked_for_has_its_part(self) -> "Recipe":
        if self.method.name == NONE and (self.tokens.add or self.tokens.train):
            raise ConfigError("tokens are given, but method is none: rows are trained beside a method; name one")
        if self.train.eval_every and self.data.eval is None:
            raise ConfigError(f"train.eval_every is {self.train.eval_every}, but data.eval names no rows to evaluate")
        return self

    @model_validator(mode="after")
    def _restarts_find_moments(self) -> "Recipe":
        optimizer, reset = self.optimizer, self.restarts.reset
        if not self.restarts.every or reset == "none":
            return self
        if optimizer.name == "sgd" and not optimizer.momentum:
            raise ConfigError(f"restarts.reset is {reset}, but sgd without momentum has no moments; set it to none")
        if optimizer.name == "adafactor" and reset != "zero":
            raise ConfigError(f"restarts.reset is {reset}, but adafactor keeps sums of rows; use zero or none")
        return self

    @model_validator(mode="after")
    def _memory_is_consistent(self) -> "Recipe":
        if self.memory.budget is not None:
            try:
                parse_bytes(self.memory.budget)
            except ConfigError as error:
                raise ConfigError(f"memory.budget: {error}") from None
        paged = [key for key, wanted in self.memory.model_dump().items() if key.startswith("page_") and wanted]
        if paged and self.train.recompute is not True:
            raise ConfigError(
                f"memory.{paged[0]} is true, but train.recompute is {str(self.train.recompute).lower()}: the backward "
                "pass would need other blocks at once; set train.recompute to true"
            )
        return self
