"""Print the losses of untrained students: random projections, copied ones, calibrated; and of no attention.

    python scripts/untrained_losses.py nano
    python scripts/untrained_losses.py smollm2-135m --corpus books.valid.txt

Prints the table of docs/mixers.md, in nats per token of validation text.
"""

import argparse
import time

import torch

import subquad
from subquad import mixers
from subquad.analysis.ablations import zero_output
from subquad.config import Data
from subquad.data import PackedDataset, token_rows
from subquad.modeling.attention.discovery import discover_attention


@torch.no_grad()
def loss(model, rows: torch.Tensor) -> float:
    return sum(model(row[None], labels=row[None], use_cache=False).loss.item() for row in rows) / len(rows)


def loss_without_attention(teacher, rows: torch.Tensor) -> float:
    """The teacher's loss if the output of every attention is zero."""
    with zero_output(layer.module for layer in discover_attention(teacher)):
        return loss(teacher, rows)


def first_rows(dataset: PackedDataset, count: int) -> torch.Tensor:
    """`[count, seq_len]`"""
    return torch.stack([dataset[i]["input_ids"] for i in range(count)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument(
        "--corpus", default="python-stdlib", help="a source of text; losses are of its validation split"
    )
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=4, help="validation rows")
    parser.add_argument("--calibrate", type=int, default=2048, help="tokens for calibration")
    parser.add_argument("--mixers", nargs="+", default=list(mixers.MIXERS))
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher(args.teacher)
    data = Data(source=args.corpus, seq_len=args.seq_len)
    validation = token_rows(data, tokenizer, "validation", limit=args.rows * args.seq_len)
    train = token_rows(data, tokenizer, "train", limit=2**16)
    rows = first_rows(validation, args.rows)
    calibration_ids = first_rows(train, max(1, args.calibrate // args.seq_len))
    print(f"teacher {loss(teacher, rows):.2f}, attention removed {loss_without_attention(teacher, rows):.2f}\n")
    print("| mixer | random | copied | calibrated | seconds |\n|---|---|---|---|---|")
    for name in args.mixers:
        random, copied = (
            loss(subquad.linearize(teacher, name, copy_qkv=copy, scale_ids=calibration_ids).eval(), rows)
            for copy in (False, True)
        )
        start = time.perf_counter()
        student = subquad.linearize(teacher, name, calibration_ids=calibration_ids).eval()
        seconds = time.perf_counter() - start
        print(f"| `{name}` | {random:.2f} | {copied:.2f} | {loss(student, rows):.2f} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
