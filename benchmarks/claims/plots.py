"""Draw a figure of a claim's finished trainings over their steps.

    python -m benchmarks.claims.plots uuids.jsonl --figure tokens_right --into uuids.svg

One panel a claim; each side at its best rate, the mean over seeds as a line, their range as a band; with
`--steps 150 180` of those steps only.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims.sweep import Result, read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--figure", required=True, help="what is drawn, e.g. tokens_right")
    parser.add_argument("--claims", nargs="+", help="only these, in this order")
    parser.add_argument("--lower-is-better", action="store_true", help="how a side's best rate is chosen")
    parser.add_argument("--steps", type=int, nargs=2, metavar=("FROM", "TO"), help="only these steps")
    parser.add_argument("--log", action="store_true", help="logarithmic axis")
    parser.add_argument("--into", type=Path, required=True, help="an .svg or .png file")
    args = parser.parse_args()
    results = read(args.results)
    names = args.claims or list(dict.fromkeys(r.claim for r in results))
    draw([[r for r in results if r.claim == name] for name in names], names, args)


def draw(panels: Sequence[Sequence[Result]], names: Sequence[str], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "veneer"  # the same bytes for the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.5), sharey=True, squeeze=False)
    for ax, name, results in zip(axes[0], names, panels, strict=True):
        for side in dict.fromkeys(r.side for r in results):
            _line(
                ax,
                side,
                at_best([r for r in results if r.side == side], args.figure, args.lower_is_better),
                args.figure,
                args.steps or (0, sys.maxsize),
            )
        ax.set(title=name, xlabel="step", yscale="log" if args.log else "linear")
        ax.grid(alpha=0.3)
    axes[0][0].set_ylabel(args.figure.replace("_", " "))
    axes[0][-1].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(args.into, metadata={"Date": None} if args.into.suffix == ".svg" else None)
    pyplot.close(figure)


def at_best(results: Sequence[Result], figure: str, lower_is_better: bool) -> list[Result]:
    """A side's results at the rate with the best last figure for seed 0."""
    sign = 1 if lower_is_better else -1
    best = min((r for r in results if r.seed == 0), key=lambda r: (sign * r.curve[-1][figure], r.lr))
    return [r for r in results if r.lr == best.lr]


def _line(ax: Any, side: str, results: Sequence[Result], figure: str, within: Sequence[int]) -> None:
    shown = [i for i, row in enumerate(results[0].curve) if within[0] <= row["step"] <= within[1]]
    steps = [results[0].curve[i]["step"] for i in shown]
    values = [[r.curve[i][figure] for r in results] for i in shown]
    (line,) = ax.plot(steps, [statistics.fmean(v) for v in values], label=f"{side}, {results[0].lr:g}")
    ax.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())


if __name__ == "__main__":
    main()
