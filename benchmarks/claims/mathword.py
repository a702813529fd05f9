"""Does MoRA reason and follow instructions as well as LoRA with equally many trained numbers?

    python -m benchmarks.claims.mathword --task mathword --out mathword.jsonl \\
        --train mathword.train.jsonl.gz --held-out mathword.val.jsonl.gz [--minutes 30]
    python -m benchmarks.claims.mathword --task instructions --out instructions.jsonl \\
        --train self_instruct_human.train.jsonl.gz --held-out self_instruct_human.val.jsonl.gz

MoRA, arXiv:2405.12130, table 1, LLaMA-2 7B, rank 8: GSM8K 64.2 and MMLU (after Tulu v2) 49.7 with MoRA, 64.6 and 50.2
with LoRA: about the same, because these tasks use what the model knows.

Here the last 4 blocks of SmolLM2-135M learn to write the equation of a word problem, or to follow instructions, and
are measured by held-out loss and exact completions (`textual.py`). benchmarks/quantization.py compares NF4, FP4 and
dense bases.
"""

from benchmarks.claims.sweep import run, table
from benchmarks.claims.text_runs import TASKS, claim_of, parser_of
from benchmarks.report import closing_line
from veneer.machine import prepare_process

SIDES = ("LoRA r 8", "MoRA r 8")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--task", choices=sorted(TASKS), required=True)
    args = parser.parse_args()
    claim = claim_of(args, args.task, SIDES)
    results = run(claim, args.out, args.minutes)
    print(f"\n{table(claim, results, also=('whole_right',))}\n", flush=True)
    closing_line({"claim": args.task, "trainings": len(results)})


if __name__ == "__main__":
    prepare_process()
    main()
