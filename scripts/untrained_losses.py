"""Print the losses of untrained students: random projections, copied ones, calibrated; and of no attention.

    python scripts/untrained_losses.py nano
    python scripts/untrained_losses.py smollm2-135m --corpus books.valid.txt
    python scripts/untrained_losses.py nano --export-targets results/export/nano-targets.csv

Prints the table of docs/mixers.md, in nats per token of validation text; or writes what export targets cost.
"""

import argparse
import csv
import time

import torch

import subquad
from subquad import mixers
from subquad.analysis.ablations import zero_output
from subquad.config import Data
from subquad.data import PackedDataset, token_rows
from subquad.modeling.attention.discovery import discover_attention
from subquad.modeling.export_target import TARGETS


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


def write_target_losses(teacher, rows: torch.Tensor, calibration_ids: torch.Tensor, path: str) -> None:
    """Losses of students with the mixer of each export target, without and with the target."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["mixer", "`export_target`", "copied", "calibrated"])
        for target in TARGETS.values():
            for key in (None, target.key):
                losses = [
                    loss(subquad.linearize(teacher, target.mixer, export_target=key, **given).eval(), rows)
                    for given in ({"scale_ids": calibration_ids}, {"calibration_ids": calibration_ids})
                ]
                name = "none" if key is None else f"`{key}`"
                table.writerow([f"`{target.mixer}`", name, *(f"{value:.2f}" for value in losses)])


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
    parser.add_argument("--export-targets", metavar="CSV", help="write the losses of export targets' students instead")
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher(args.teacher)
    data = Data(source=args.corpus, seq_len=args.seq_len)
    validation = token_rows(data, tokenizer, "validation", limit=args.rows * args.seq_len)
    train = token_rows(data, tokenizer, "train", limit=2**16)
    rows = first_rows(validation, args.rows)
    calibration_ids = first_rows(train, max(1, args.calibrate // args.seq_len))
    if args.export_targets:
        write_target_losses(teacher, rows, calibration_ids, args.export_targets)
        return
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
