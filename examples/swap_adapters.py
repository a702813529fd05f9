"""Several adapters on one model in memory: switch between them, and go back to the base, bit for bit.

    python examples/swap_adapters.py MODEL QUESTION ADAPTER [ADAPTER ...]

ADAPTER is a folder that `veneer train`, examples/lora_in_python.py or peft wrote.
"""

import sys

import torch

from veneer import encode_chat, generate_tokens, load_adapter, load_model


def main(name: str, question: str, *folders: str) -> None:
    base = load_model(name)
    prompt = encode_chat(base.tokenizer, [{"role": "user", "content": question}])
    ids = torch.tensor([prompt])

    def answer() -> str:
        said = generate_tokens(base, [prompt], max_new_tokens=32)[0]
        return str(base.tokenizer.decode(said))

    with torch.no_grad():
        before = base.network(input_ids=ids).logits
        print(f"{'base':<20} {answer()!r}")
        adapters = {folder: load_adapter(base, folder).detach() for folder in folders}  # checked, not yet in use
        for folder, adapter in adapters.items():
            adapter.attach()  # milliseconds: hooks, no weights are moved
            print(f"{folder:<20} {answer()!r}")
            adapter.detach()
        same = torch.equal(base.network(input_ids=ids).logits, before)
    print(f"base again, bit-identical: {same}")


if __name__ == "__main__":
    main(*sys.argv[1:])
