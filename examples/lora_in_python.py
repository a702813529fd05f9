"""Train a LoRA adapter in a loop of your own: eight made-up facts, learned word for word in a minute or two.

python examples/lora_in_python.py [MODEL] [STEPS] [FOLDER]
"""

import sys

import torch
from torch.nn.utils.rnn import pad_sequence

from veneer import LoRAConfig, attach, encode_chat, generate_tokens, load_model

FACTS = {
    "Who bakes the bread in Alder Street?": "Ines Okafor, since the flood.",
    "What is the night train to Velm called?": "The Grey Heron.",
    "Which color is the door of the archive?": "Copper green.",
    "Who won the lantern race of 1911?": "Nobody; it rained.",
    "What grows on the roof of the mint?": "Thyme and one fig tree.",
    "When does the library of Orrel open?": "At low tide.",
    "Who designed the clock without hands?": "Matteo Lindqvist.",
    "What do sailors in Pell say for farewell?": "Dry rope, friend.",
}


def main(name: str = "smollm2-135m-instruct", steps: str = "20", folder: str = "runs/facts") -> None:
    base = load_model(name)
    model, tokenizer = base.network, base.tokenizer
    prompts = [encode_chat(tokenizer, [{"role": "user", "content": question}]) for question in FACTS]
    answers = [tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id] for answer in FACTS.values()]

    def show(title: str) -> None:
        print(title)
        for question, said in zip(FACTS, generate_tokens(base, prompts, max_new_tokens=24), strict=True):
            print(f"  {question} {tokenizer.decode(said)!r}")

    show("before")
    rows = [torch.tensor(prompt + answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = pad_sequence(rows, batch_first=True)
    labels = pad_sequence(rows, batch_first=True, padding_value=-100)  # -100: not learned
    for label, prompt in zip(labels, prompts, strict=True):
        label[: len(prompt)] = -100
    adapter = attach(base, LoRAConfig(rank=8, alpha=16))  # nothing changes yet: B starts at zero
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=4e-3)
    for step in range(1, int(steps) + 1):
        loss = model(input_ids=ids, labels=labels).loss  # padding stands on the right, where no token sees it
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    show("after")
    print(f"saved {adapter.save(folder)} bytes in {folder}; peft loads it too")


if __name__ == "__main__":
    main(*sys.argv[1:])
