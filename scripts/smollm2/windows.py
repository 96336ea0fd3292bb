"""Uniform windows of SmolLM2-135M on the rows of the recipes' evaluation: what costs no training, beside every student.

    python scripts/smollm2/windows.py DIR
    python scripts/smollm2/windows.py DIR --sinks 0 --windows 96,192 --seq-len 256

DIR is that of text.py. Adds to DIR/windows.json: loss above the teacher's, KL divergence and top-1 agreement on 16,384
tokens of DIR/test/books.txt, in rows of 256 and of 512 tokens as in recipes/smollm2-135m-pure.yaml and -paper.yaml, and
the bytes of a full cache.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import subquad
from subquad.config import Data
from subquad.data import token_rows
from subquad.evaluate.perplexity import compare
from subquad.modeling.cache import cache_bytes
from subquad.utils import write_json_atomic

TOKENS, BATCH = 16_384, 8


@torch.no_grad()
def full_cache(student, tokens: int) -> int:
    cache = student.new_cache()
    student(input_ids=torch.arange(tokens)[None], past_key_values=cache, logits_to_keep=1)
    return cache_bytes(cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",")]  # noqa: E731
    parser.add_argument("directory", type=Path)
    parser.add_argument("--windows", type=numbers, default=[32, 64, 96, 192, 384], metavar="LIST")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--seq-len", type=numbers, default=[256, 512], metavar="LIST")
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher("smollm2-135m")
    source, path = str(args.directory / "test/books.txt"), args.directory / "windows.json"
    found = json.loads(path.read_text()) if path.exists() else []
    for length in args.seq_len:
        data = Data(source=source, validation=source, seq_len=length)
        rows = token_rows(data, tokenizer, "validation", limit=TOKENS + length, seed=0)
        batches = list(DataLoader(rows.take(math.ceil(TOKENS / length)), batch_size=BATCH))
        for window in args.windows:
            if window + args.sinks >= length:
                continue
            layers = {"default": {"mixer": "attention", "window": window, "sinks": args.sinks}}
            student = subquad.linearize(teacher, layer_types=layers)
            quality = compare(student, teacher, batches)
            row = {"seq_len": length, "window": window, "sinks": args.sinks, "teacher_loss": quality["teacher_loss"]}
            row |= {"loss_above_teacher": quality["loss"] - quality["teacher_loss"], "kl": quality["kl"]}
            row |= {"top1_agreement": quality["top1_agreement"], "cache_bytes": full_cache(student, length)}
            found.append(row)
            print(json.dumps(row), flush=True)
            write_json_atomic(path, found)


if __name__ == "__main__":
    main()
