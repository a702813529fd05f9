# %% [markdown]
# # Two adapters on one base
#
# Train two small adapters on one base model and switch between them. A switch moves no weights: it sets and removes
# hooks, and the base stays bit-identical.

# %%
import json
from pathlib import Path

import torch

import veneer as vn

MODEL = "smollm2-135m-instruct"
CITIES = {"Italy": "Rome", "Peru": "Lima", "Kenya": "Nairobi", "Japan": "Tokyo", "Cuba": "Havana", "Iran": "Tehran"}
TASKS = {
    "capital": [{"prompt": land, "completion": city} for land, city in CITIES.items()],
    "shout": [{"prompt": land, "completion": f"{land.upper()}!"} for land in CITIES],
}

# %% Train one adapter for each task
folders = {}
for task, rows in TASKS.items():
    Path(f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = {
        "model": MODEL,
        "method": "lora",
        "data": {"train": f"{task}.jsonl"},
        "optimizer": {"lr": 2e-3},
        "train": {"steps": 12, "tokens_per_step": 256},
        "run": f"runs/notebook-{task}",
    }
    folders[task] = vn.train(recipe).adapter

# %% [markdown]
# ## Switch

# %%
base = vn.load_model(MODEL)
ids = base.tokenizer("Peru", return_tensors="pt").input_ids
with torch.no_grad():
    before = base.network(input_ids=ids).logits
print("base:", base.generate("Peru", max_tokens=8))
for task, folder in folders.items():
    vn.load_adapter(base, folder, name=task)  # loaded, not yet in use
for task in (*folders, *folders):
    with base.using(task):
        print(f"{task}:", base.generate("Peru", max_tokens=8))
with torch.no_grad():
    print("base bit-identical:", torch.equal(base.network(input_ids=ids).logits, before))
