"""Is LoRA as good as training all weights, at a fraction of the memory?  Is rank 1 enough?

    python -m benchmarks.claims.lora --out mathword.jsonl \\
        --train mathword.train.jsonl.gz --held-out mathword.val.jsonl.gz [--minutes 30]

LoRA, arXiv:2106.09685: as good as full fine-tuning on GPT-3 (WikiSQL 73.4 against 73.8, MNLI 91.7 against 89.5) with
10,000 times fewer trained numbers; rank 1 on queries and values has 73.4 on WikiSQL (rank 8: 73.8); a third of the
memory, 25 % faster; no latency once merged, where bottleneck adapters add 21 to 30 % (batch 1; table 1). For latency:
benchmarks/merged_latency.py.

Here word problems as in mathword.py; "full" trains every linear layer of the same blocks. `optimizer_bytes` is AdamW's
state, `adapter_bytes` what the trained numbers take in float32, `step_seconds` a step's time, measured with
--seeds 1 --n-rates 1 on a quiet machine.
"""

from benchmarks.claims.sweep import run, table
from benchmarks.claims.text_runs import claim_of, parser_of
from benchmarks.report import closing_line
from veneer.machine import prepare_process

SIDES = ("LoRA r 8", "LoRA r 1", "full")


def main() -> None:
    args = parser_of(__doc__).parse_args()
    claim = claim_of(args, "mathword", SIDES)
    results = run(claim, args.out, args.minutes)
    print(f"\n{table(claim, results, also=('whole_right', 'optimizer_bytes', 'step_seconds'))}\n", flush=True)
    closing_line({"claim": "lora", "trainings": len(results)})


if __name__ == "__main__":
    prepare_process()
    main()
