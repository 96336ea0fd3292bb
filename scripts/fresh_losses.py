"""The loss of a freshly linearized student, nothing taught yet: random, copied, calibrated; and without attention.

    python scripts/fresh_losses.py nano
    python scripts/fresh_losses.py smollm2-135m --corpus books.valid.txt

Prints the table of docs/mixers.md, in nats on held-out text.
"""

import argparse
import time

import torch

import subquad
from subquad import mixers
from subquad.analysis.ablations import zero_output
from subquad.config import Data
from subquad.data import token_rows
from subquad.modeling.attention.discovery import discover_attention


@torch.no_grad()
def loss(model, rows: torch.Tensor) -> float:
    return sum(model(row[None], labels=row[None], use_cache=False).loss.item() for row in rows) / len(rows)


def without_attention(teacher, rows: torch.Tensor) -> float:
    """The teacher's loss where the output of every attention is zero."""
    with zero_output(site.module for site in discover_attention(teacher)):
        return loss(teacher, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--corpus", default="python-stdlib", help="a source of text; its held-out part is used")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--calibrate", type=int, default=2048, help="tokens of calibration")
    parser.add_argument("--mixers", nargs="+", default=list(mixers.REGISTRY))
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher(args.teacher)
    corpus = Data(source=args.corpus, seq_len=args.context)
    held_out = token_rows(corpus, tokenizer, "validation", limit=args.rows * args.context)
    rows = torch.stack([held_out[i]["input_ids"] for i in range(args.rows)])
    text = token_rows(corpus, tokenizer, "train", limit=2**16)
    calibration = torch.stack([text[i]["input_ids"] for i in range(max(1, args.calibrate // args.context))])
    print(f"teacher {loss(teacher, rows):.2f}, attention removed {without_attention(teacher, rows):.2f}\n")
    print("| mixer | random | copied | calibrated | seconds |\n|---|---|---|---|---|")
    for name in args.mixers:
        values = [
            loss(subquad.linearize(teacher, name, copy_qkv=copy, scale_ids=calibration).eval(), rows)
            for copy in (False, True)
        ]
        start = time.perf_counter()
        student = subquad.linearize(teacher, name, calibration_ids=calibration).eval()
        seconds = time.perf_counter() - start
        print(
            f"| `{name}` | {values[0]:.2f} | {values[1]:.2f} | {loss(student, rows):.2f} | {seconds:.0f} |", flush=True
        )


if __name__ == "__main__":
    main()
