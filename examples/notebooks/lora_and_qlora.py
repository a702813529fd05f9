# %% [markdown]
# # LoRA and QLoRA on your rows
#
# Train one LoRA beside the base in 16 bits and one beside the same base in 4 bits (QLoRA), ask before and after, and
# merge. Start it in the root folder of veneer, or put your own file and columns into `RECIPE`.

# %%
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
lora = vn.train(RECIPE, run="runs/notebook-lora")
qlora = vn.train(RECIPE, storage="nf4", run="runs/notebook-qlora")
print(f"held-out loss: LoRA {lora.eval_loss:.3f}, QLoRA {qlora.eval_loss:.3f}")

# %% [markdown]
# ## Before and after

# %%
base = vn.load_model("smollm2-135m-instruct")
adapter = vn.load_adapter(base, lora.adapter)
question = QUESTION.format(ticket="The parcel was damaged when it arrived.")
with adapter.disabled():
    print("before:", base.generate(question, max_tokens=16))
print("after: ", base.generate(question, max_tokens=16))
print(vn.evaluate(base, "examples/tickets_held_out.jsonl", metrics=["accuracy"], max_new_tokens=4).metrics)

# %% [markdown]
# ## Merge
# The result is a model folder that transformers loads. It is compared with the unmerged model on the training rows.

# %%
merged = adapter.merge("models/notebook-tickets")
print(f"merged, and verified on {merged.drift.rows} rows")
