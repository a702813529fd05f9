# %% [markdown]
# # LoRA and QLoRA on your rows
#
# Train one LoRA beside the base in 16 bits and one beside the same base in 4 bits (QLoRA), ask before and after, and
# merge. Start it in the root folder of veneer, or put your own file and columns into `RECIPE`.

# %%
from pathlib import Path

import veneer as vn

QUESTION = "Which team should answer this ticket? {ticket}"
RECIPE = {
    "model": "smollm2-135m-instruct",
    "method": {"name": "lora", "rank": 16, "alpha": 32},
    "data": {"train": "examples/tickets.jsonl", "eval": "examples/tickets_held_out.jsonl"}
    | {"prompt": QUESTION, "completion": "{team}"},
    "optimizer": {"lr": 2e-3},
    "train": {"epochs": 4, "tokens_per_step": 512, "max_length": 256},
}

# %% [markdown]
# ## Train
# The two recipes differ in one key. A run that is finished is not trained again.

# %%
lora, _ = vn.train_adapter(vn.recipe_from({**RECIPE, "run": "runs/notebook-lora"}))
qlora, _ = vn.train_adapter(vn.recipe_from({**RECIPE, "storage": "nf4", "run": "runs/notebook-qlora"}))
print(f"held-out loss: LoRA {lora.eval_loss:.3f}, QLoRA {qlora.eval_loss:.3f}")

# %% [markdown]
# ## Before and after

# %%
base = vn.load_model("smollm2-135m-instruct")
adapter = vn.load_adapter(base, lora.adapter)
asked = QUESTION.format(ticket="The parcel was damaged when it arrived.")
prompt = vn.encode_chat(base.tokenizer, [{"role": "user", "content": asked}])


def answer() -> str:
    return base.tokenizer.decode(vn.generate_tokens(base, [prompt], max_new_tokens=16)[0])


with adapter.disabled():
    print("before:", answer())
print("after: ", answer())

# %% [markdown]
# ## Merge
# The result is a model folder that transformers loads; it is compared with the unmerged model before this returns.

# %%
print(vn.merge_and_verify(base, adapter, Path("models/notebook-tickets"), [prompt]))
