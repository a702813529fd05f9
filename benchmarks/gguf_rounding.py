"""What does storing dequantized GGUF weights as bfloat16 lose?  Loss on real text, against the float32 values.

    python benchmarks/gguf_rounding.py FILE.gguf --text FILE.txt [--tokens 4096]

Both models compute in float32 and differ only in the rounding of their stored matrices. Figures: nats a token of each,
and the mean KL divergence of the rounded model's predictions from the exact one's.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from unittest import mock

import torch

from veneer import machine
from veneer.base.load import load_model
from veneer.models import gguf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    exact_spec = lambda tensor: (torch.float32, tuple(int(n) for n in reversed(tensor.shape)))  # noqa: E731
    with tempfile.TemporaryDirectory() as scratch:
        exact, rounded = Path(scratch) / "exact", Path(scratch) / "rounded"
        exact.mkdir(), rounded.mkdir()
        gguf.convert_gguf(options.file, rounded)
        with mock.patch.object(gguf, "_spec", exact_spec):
            gguf.convert_gguf(options.file, exact)
        sizes = {f.name: sum(part.stat().st_size for part in f.iterdir()) for f in (exact, rounded)}
        models = [load_model(folder, dtype="float32") for folder in (exact, rounded)]
    ids = models[0].tokenizer(options.text.read_text(encoding="utf-8")).input_ids[: options.tokens]
    losses, divergence, count = [0.0, 0.0], 0.0, 0
    for start in range(0, len(ids) - 1, 512):
        piece = torch.tensor([ids[start : start + 513]])
        with torch.no_grad():
            scores = [m.model(input_ids=piece[:, :-1]).logits[0].log_softmax(-1) for m in models]
        for i, score in enumerate(scores):
            losses[i] -= score.gather(1, piece[0, 1:, None]).sum().item()
        divergence += (scores[0].exp() * (scores[0] - scores[1])).sum().item()
        count += piece.shape[1] - 1
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    figures = {
        "tokens": count,
        "float32_nats": round(losses[0] / count, 5),
        "bfloat16_nats": round(losses[1] / count, 5),
        "kl_nats": divergence / count,
        "float32_bytes": sizes["exact"],
        "bfloat16_bytes": sizes["rounded"],
    }
    print(json.dumps({"machine": machine.describe().summary(), "commit": commit.stdout.strip(), **figures}))


if __name__ == "__main__":
    main()
