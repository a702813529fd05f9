"""Show what a recipe would train: rows with trained tokens marked, lengths, totals."""

from pathlib import Path
from typing import Annotated, Any

import typer

from veneer.cli.console import AsJson, emit_json, say, stderr, stdout

SETTINGS = {"context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


def command(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show whole.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Show what a recipe would train, as tokens: nothing is trained and no weights are loaded.

    Every key of the recipe is a flag, as for `veneer train`. Example:

        veneer data recipe.yaml --rows 5 --data.too_long drop
    """
    from veneer.base.vocabulary import add_tokens
    from veneer.data.preview import colored, describe, histogram, segments
    from veneer.models.skeleton import load_tokenizer
    from veneer.models.sources import resolve
    from veneer.recipe.load import load_recipe, parse_flags

    settings = load_recipe(recipe, parse_flags(context.args))
    tokenizer = load_tokenizer(resolve(settings.model))
    add_tokens(tokenizer, settings.tokens.add)
    result: dict[str, Any] = {}
    for part, source in (("train", settings.data.train), ("eval", settings.data.eval)):
        if source is None:
            continue
        rendered, figures, report = _rendered(part, source, settings, tokenizer)
        shown = [(e, segments(e, tokenizer)) for e in rendered.examples[:rows]]
        preview = [{"line": e.line, "segments": [{"text": s.text, "trained": s.trained} for s in p]} for e, p in shown]
        result[part] = {"source": source, **report, "preview": preview}
        if as_json:
            continue
        color = stdout.color_system is not None and not stdout.no_color
        if shown:
            say(f"{part}: trained text is {'green' if color else 'between ⟦ and ⟧'}")
        for example, parts in shown:
            say(f"\n--- {example.source}:{example.line}, {len(example)} tokens, {example.supervised.sum()} trained")
            stdout.print(colored(parts, color), soft_wrap=True)
        lengths = [len(e) for e in rendered.examples]
        say("\n".join(["", f"{part}: {source}", *describe(rendered, figures), "", "tokens of an example"]))
        say("\n".join([*histogram(lengths), ""]))
    if as_json:
        emit_json(result)


def _rendered(part: str, source: str, settings: Any, tokenizer: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Examples, totals and both as JSON, for one source of rows."""
    from veneer.data.pack import plan_batches
    from veneer.data.preview import as_json, totals
    from veneer.data.progress import showing
    from veneer.data.render import Renderer
    from veneer.data.sources import read_rows

    data, train = settings.data, settings.train
    found = read_rows(source, split=data.split, limit=data.rows if part == "train" else data.eval_rows)
    with showing("rendering rows", len(found), stderr) as advance:
        rendered = Renderer(tokenizer, data, train.max_length).render_all(found, progress=advance)
    plan = plan_batches(
        [len(e) for e in rendered.examples],
        max_length=train.max_length,
        tokens_per_step=train.tokens_per_step,
        micro_batch_tokens=train.micro_batch_tokens,
        seed=train.seed,
        epoch=0,
        packing=data.packing,
    )
    figures = totals(rendered, plan)
    return rendered, figures, as_json(rendered, figures)
