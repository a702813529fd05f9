"""Write what a model, with or without an adapter, says to a prompt."""

import sys
from pathlib import Path
from time import monotonic
from typing import Annotated, Any

import typer

from veneer.cli.console import AllowOtherBase, AsJson, DeviceName, Dtype, Form, KeptIn, Model, emit_json, remark, stderr


def command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="What the model answers; - reads it from standard input.")],
    adapter: Annotated[Path | None, typer.Option(metavar="DIR", help="Adapter folder to attach.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Most tokens of the answer.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 for the likeliest text; above 0 draws by chance.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Draw from so many likeliest tokens; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the drawing.")] = 0,
    system: Annotated[str | None, typer.Option(help="System message in front of the prompt.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt as it is, with nothing around it.")] = False,
    format: Form = None,  # noqa: A002
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; may be repeated.")] = None,
    dtype: Dtype = "auto",
    device: DeviceName = "auto",
    storage: KeptIn = None,
    allow_other_base: AllowOtherBase = False,
    as_json: AsJson = False,
) -> None:
    """Write the model's answer to a prompt, as it comes.

    Example:

        veneer generate smollm2-135m-instruct --adapter runs/sql/adapter --prompt "How many customers are there?"
    """
    from veneer.adapters.attach import load_adapter
    from veneer.base.load import load_model
    from veneer.base.storage_config import storage_for
    from veneer.data.prompt_format import form_of
    from veneer.disk.adapter_dir import read_facts
    from veneer.errors import ConfigError, DataError
    from veneer.generate.streaming import encode, sampler_of, speak

    sampler = sampler_of(temperature, top_p, top_k, seed)
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise DataError("the prompt is empty" + (": standard input held nothing" if prompt == "-" else ""))
    if raw and format is not None:
        raise ConfigError(f"--raw and --format {format} exclude each other: a raw prompt is put as it is")
    form = form_of({} if adapter is None else read_facts(adapter), "raw" if raw else format)
    kept = storage_for([] if adapter is None else [adapter], storage)
    base = load_model(model, storage=kept, device=device, dtype=dtype, say=remark)
    if adapter is not None:
        load_adapter(base, adapter, allow_other_base=allow_other_base)
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": text}]
    tokens = encode(base.tokenizer, messages, plain=form)
    begin = monotonic()
    show = (lambda piece: None) if as_json else (lambda piece: print(piece, end="", flush=True))
    written = speak(base, tokens, max_new_tokens=max_tokens, sampler=sampler, show=show, stop=stop or ())
    seconds = monotonic() - begin
    if not as_json:
        print(flush=True)
    result: dict[str, Any] = {"text": written.text, "prompt_tokens": len(tokens), "tokens": written.tokens}
    if as_json:
        emit_json(result | {"seconds": seconds, "stopped": written.stopped})
    elif not written.stopped and stderr.is_terminal:
        stderr.print(f"(stopped after {max_tokens} tokens; --max-tokens allows more)", style="dim")
