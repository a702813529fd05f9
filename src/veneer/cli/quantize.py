"""Write a model with its linear layers in 4 or 8 bits, as a folder that transformers loads too."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from veneer.cli.console import AsJson, DeviceName, Model, emit_json, say, stderr
from veneer.units import format_bytes

if TYPE_CHECKING:
    from torch import Tensor

    from veneer.storage import Storage


def command(
    model: Model,
    to: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it must not exist yet.")],
    storage: Annotated[str, typer.Option(metavar="nf4|fp4|int8", help="How weights are kept.")] = "nf4",
    block: Annotated[
        int | None,
        typer.Option(help="4-bit: weights that share one absmax, a power of two from 32 to 4096; 64 if not given."),
    ] = None,
    no_double_quant: Annotated[
        bool, typer.Option("--no-double-quant", help="4-bit: keep absmax in 32 bits, not in 8.")
    ] = False,
    device: DeviceName = "auto",
    as_json: AsJson = False,
) -> None:
    """Quantize a model into a folder that veneer maps, and that transformers loads with bitsandbytes.

    All linear layers but the output head are quantized; embeddings and norms are copied. Example:

        veneer quantize smollm2-135m-instruct --to models/smollm2-nf4
    """
    from veneer.base.device import find_device
    from veneer.base.quant_cache import is_quantized, misread_on_cpu, quantize_weights, write_quantized
    from veneer.base.quantize import Quantizer
    from veneer.base.storage_config import DENSE, base_storage
    from veneer.errors import ConfigError, ModelError, listed
    from veneer.models.sources import resolve

    settings: dict[str, Any] = {"name": storage} | ({"block": block} if block is not None else {})
    kept = base_storage(settings | ({"double_quant": False} if no_double_quant else {}))
    if kept is None:
        raise ConfigError(f"--storage {DENSE} quantizes nothing; choose nf4, fp4 or int8")
    _refuse_taken(to)
    where = find_device(device)
    folder = resolve(model)
    if is_quantized(folder):
        raise ConfigError(f"{model} is quantized already; give the model it was made from")
    errors = Errors()
    with ExitStack() as shown:
        made = Quantizer(kept, seen=errors, progress=_bar("quantizing weights", shown), device=where)
        quantize_weights(folder, made)
    if not made.homes:
        raise ModelError(f"{model} keeps its weights in another arrangement than its files; it cannot be written so")
    _refuse_taken(to)  # by another process meanwhile
    with ExitStack() as shown:
        size = write_quantized(folder, to, made, _bar("writing tensors", shown))
    misread = misread_on_cpu(made)
    if misread:
        stderr.print(
            "veneer reads this folder right, but bitsandbytes 0.50.2 on a CPU with AVX-512 misreads "
            f"{listed(misread, 1, ', ')}, whose rows are not a multiple of the block; for use with it give --block a "
            "divisor of the row's length",
            markup=False,
            soft_wrap=True,
        )
    result = {"folder": str(to), "storage": kept.settings, "bytes": size, **errors.figures()}
    result["misread_by_bitsandbytes_on_cpu"] = misread
    if as_json:
        emit_json(result)
        return
    say(f"{to}: {format_bytes(size)}, {kept}")
    say(errors.text())


def _refuse_taken(to: Path) -> None:
    from veneer.errors import ConfigError

    if to.exists() or to.is_symlink():
        raise ConfigError(f"{to} exists already; write into a new folder, or remove that one")


def _bar(what: str, shown: ExitStack) -> Callable[[int, int], None]:
    """A progress bar that begins when the total is known, and ends with the block that `shown` belongs to."""
    from veneer.data.progress import showing

    advance: list[Callable[[int], None]] = []

    def tell(done: int, total: int) -> None:
        if not advance:
            advance.append(shown.enter_context(showing(what, total, stderr)))
        advance[0](1)

    return tell


class Errors:
    """Listens to what is quantized: sizes, and how far the weights moved."""

    def __init__(self) -> None:
        self.weights = self.nbytes = 0
        self._difference = self._size = self._largest = 0.0
        self._layers: dict[str, float] = {}

    def __call__(self, path: str, w: "Tensor", kept: "Storage") -> None:
        from veneer.base.device import Device

        dense = w.float()
        moved = kept.dense(dense.dtype) - dense
        self._largest = max(self._largest, float(moved.abs().max()))
        difference = float(moved.square().sum(dtype=Device(w.device).wide_dtype))
        size = float(dense.square().sum())
        self.weights += w.numel()
        self.nbytes += kept.nbytes
        self._difference += difference
        self._size += size
        self._layers[path] = (difference / size) ** 0.5 if size else 0.0

    def figures(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        worst = max(self._layers, key=lambda path: self._layers[path])
        return {
            "layers": len(self._layers),
            "weights": self.weights,
            "weight_bytes": self.nbytes,
            "bits_per_weight": 8 * self.nbytes / self.weights,
            "relative_error": (self._difference / self._size) ** 0.5 if self._size else 0.0,
            "worst_layer": worst,
            "worst_relative_error": self._layers[worst],
            "largest_difference": self._largest,
        }

    def text(self) -> str:
        """The same for people."""
        f = self.figures()
        return (
            f"{f['layers']} layers, {f['weights']:,} weights in {format_bytes(f['weight_bytes'])}: "
            f"{f['bits_per_weight']:.3f} bits a weight\n"
            f"relative error {f['relative_error']:.4f}, at worst {f['worst_relative_error']:.4f} in {f['worst_layer']}"
        )
