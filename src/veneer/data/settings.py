"""The recipe's `data:` part: where rows come from and how one becomes text to train on."""

from string import Formatter
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from veneer.errors import ConfigError


def template_fields(template: str) -> list[str]:
    """The columns a template names, in order: "{question}\\n{schema}" -> ["question", "schema"].

    Raises ValueError for a brace that is not closed, or for a field that is more than a column's name.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; double a brace that is meant as itself: {{{{ }}}}") from None
    names = []
    for _, name, form, conversion in parts:
        if name is None:
            continue
        if not name or form or conversion:
            raise ValueError(
                f"template {template!r}: between braces stands a column's name and nothing else; "
                "double a brace that is meant as itself: {{ }}"
            )
        names.append(name)
    return names


DEFAULT_SEPARATOR = "\n"


class DataSettings(BaseModel):
    """What is trained on. Templates name columns in braces: "{question}\\n{schema}"."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    train: str
    """Rows to train on: a .jsonl, .json, .csv, .tsv or .parquet file (plain or .gz), or a data set of the Hugging Face
    hub, NAME or NAME:CONFIG."""
    eval: str | None = None
    """Rows held out, named like `train`; none: no evaluation."""
    split: str = "train"
    """Split of a hub data set; files have none."""
    prompt: str | None = None
    """Template of what the model reads. A single word is a column's name."""
    completion: str | None = None
    """Template of what the model learns to write. A single word is a column's name."""
    text: str | None = None
    """Template of running text, all of which is trained. A single word is a column's name."""
    system: str | None = None
    """Template of the system message in front of chats that bring none; none: as the tokenizer's chat template does."""
    format: Literal["chat", "plain"] = "chat"
    """chat: the tokenizer's chat template; plain: prompt, separator, completion and the end-of-text token."""
    separator: str = DEFAULT_SEPARATOR
    """What stands between prompt and completion when `format` is plain."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Rows of more than max_length tokens: truncate the prompt from its left (the completion is never cut, running text
    is split), or drop them. Both are counted."""
    packing: bool = True
    """Put several documents into one micro-batch, each attending to itself alone; false: one at a time, much slower."""
    rows: int | None = Field(default=None, ge=1)
    """Most rows to read for training, at least 1; none: all."""
    eval_rows: int | None = Field(default=None, ge=1)
    """Most rows to read for evaluation, at least 1; none: all."""

    @field_validator("prompt", "completion", "text", "system")
    @classmethod
    def _well_formed(cls, template: str | None, info: ValidationInfo) -> str | None:
        if template is not None:
            try:
                template_fields(template)
            except ValueError as error:
                raise ConfigError(f"data.{info.field_name}: {error}") from None
        return template

    @model_validator(mode="after")
    def _consistent(self) -> "DataSettings":
        problems = []
        if (self.prompt is None) != (self.completion is None):
            problems.append("prompt and completion go together: write both, or neither to have the rows recognized")
        if self.text is not None and self.prompt is not None:
            problems.append("text and prompt/completion exclude each other: text is trained as a whole")
        if self.system is not None and self.format == "plain":
            problems.append("system has no place in format: plain; write it into the prompt's template")
        if self.system is not None and self.text is not None:
            problems.append("system has no place before text, which is trained as it is")
        if self.separator != DEFAULT_SEPARATOR and self.format == "chat":
            problems.append("separator is for format: plain; a chat template has its own")
        if self.eval_rows is not None and self.eval is None:
            problems.append("eval_rows needs eval, the file of the rows held out")
        if problems:
            raise ConfigError("data: " + "; ".join(problems))
        return self
