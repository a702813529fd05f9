"""Train each toy case a few steps in peft and store what peft writes, with the outputs it gave.

    python -m tests.golden.make_peft

Writes tests/golden/lora/CASE/{adapter_config.json, adapter_model.safetensors, outputs.safetensors}; the bytes here are
of peft 0.21.2.
"""

import json
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.golden.toys import CASES, MODELS, inputs, outputs

HERE = Path(__file__).parent / "lora"


def trained(model: nn.Module, settings: dict[str, Any], x: Tensor, steps: int = 4, **wrap: Any) -> Any:
    """A peft model whose adapter took a few steps of AdamW towards made targets, back in eval mode."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(**settings), **wrap)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped.train()
    for _ in range(steps):
        y = outputs(wrapped, x)
        loss = (y - torch.sin(torch.arange(y.numel()).reshape(y.shape) * 1.3)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped.eval()


def main() -> None:
    for case, (name, settings) in CASES.items():
        torch.manual_seed(0)
        x = inputs(name)
        wrapped = trained(MODELS[name](), settings, x)
        folder = HERE / case.replace(" ", "_")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as temporary:
            wrapped.save_pretrained(temporary)
            config = json.loads((Path(temporary) / "adapter_config.json").read_text())
            (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            shutil.copy(Path(temporary) / "adapter_model.safetensors", folder)
        with torch.no_grad():
            save_file({"y": outputs(wrapped, x).contiguous()}, folder / "outputs.safetensors")
        print(f"{case}: {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
