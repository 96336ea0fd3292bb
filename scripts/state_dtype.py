"""Measure what states in bfloat16 cost: calibrated students read validation text token by token, with a cache.

    python scripts/state_dtype.py nano > results/states/nano.csv

Prints the table of docs/mixers.md: nats per token of the last quarter of the rows, and the relative error of the states
(their Frobenius norms) against a student in float64.
"""

import argparse
import copy
import csv
import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

import subquad
from subquad import SubquadForCausalLM
from subquad.config import Data
from subquad.data import PackedDataset, token_rows

MIXERS = ("gated_deltanet", "gla", "linear_attention")


def first_rows(dataset: PackedDataset, count: int) -> Tensor:
    """`[count, seq_len]`"""
    return torch.stack([dataset[i]["input_ids"] for i in range(count)])


def with_dtypes(student: SubquadForCausalLM, state_dtype: str, dtype: torch.dtype) -> SubquadForCausalLM:
    made = copy.deepcopy(student).to(dtype)  # type: ignore[arg-type]
    for layer in made.mixer_layers:
        layer.mixer.options = replace(layer.mixer.options, state_dtype=state_dtype)
    return made


@torch.no_grad()
def read(student: SubquadForCausalLM, rows: Tensor, tokens: int = 1) -> tuple[float, list[Tensor]]:
    """Reads `rows: [B, T]` in calls of so many tokens. Returns nats per token of the last quarter, and the states
    `[B, G, K, V]` of all layers in float64."""
    cache, losses = student.new_cache(), []
    for ids, targets in zip(rows[:, :-1].split(tokens, 1), rows[:, 1:].split(tokens, 1), strict=True):
        logits = student(input_ids=ids, past_key_values=cache).logits
        losses.append(F.cross_entropy(logits.mT.double(), targets, reduction="none"))
    late = torch.cat(losses, 1)[:, -(rows.shape[1] // 4) :]
    states = [x.double() for layer in cache.layers for x in layer.states if x.dim() == 4]
    return late.mean().item(), states


def relative_error(states: list[Tensor], exact: list[Tensor]) -> float:
    pairs = [((a - b).square().sum(), b.square().sum()) for a, b in zip(states, exact, strict=True)]
    return float((sum(a for a, _ in pairs) / sum(b for _, b in pairs)) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument(
        "--corpus", default="python-stdlib", help="a source of text; losses are of its validation split"
    )
    parser.add_argument("--tokens", type=int, default=4096, help="tokens in a row")
    parser.add_argument("--rows", type=int, default=4, help="validation rows")
    parser.add_argument("--mixers", nargs="+", default=MIXERS)
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher(args.teacher)
    data = Data(source=args.corpus, seq_len=512)
    calibration_ids = first_rows(token_rows(data, tokenizer, "train", limit=2**16), 4)
    data = Data(source=args.corpus, seq_len=args.tokens)
    rows = first_rows(token_rows(data, tokenizer, "validation", limit=args.rows * args.tokens), args.rows)
    table = csv.writer(sys.stdout)
    table.writerow(["mixer", "float32, nats", "bfloat16, nats", "float32, state error", "bfloat16, state error"])
    for name in args.mixers:
        student = subquad.linearize(teacher, name, calibration_ids=calibration_ids, rotary=False).eval()
        _, exact = read(with_dtypes(student, "float32", torch.float64), rows, tokens=256)
        found = [read(with_dtypes(student, dtype, torch.float32), rows) for dtype in ("float32", "bfloat16")]
        errors = [f"{relative_error(states, exact):.1e}" for _, states in found]
        table.writerow([f"`{name}`", *(f"{loss:.4f}" for loss, _ in found), *errors])
        sys.stdout.flush()


if __name__ == "__main__":
    main()
