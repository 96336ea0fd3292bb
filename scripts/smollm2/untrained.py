"""What SmolLM2-135M gives without training, on the rows of the recipes' evaluation: uniform windows, windows by error
at a budget of bytes, and the teacher with integer weights.

    python -m scripts.smollm2.untrained DIR
    python -m scripts.smollm2.untrained DIR --seq-len 256 --windows 96,192 --sinks 0 --budgets "" --bits ""

DIR is that of text.py; windows by error are chosen on its training books. Adds to results/smollm2-135m/untrained.json
the loss above the teacher's, KL divergence and top-1 agreement on 16,384 tokens of DIR/test/books.txt, in rows of 256
and of 512 tokens as in recipes/smollm2-135m-pure.yaml and -paper.yaml, and the bytes of the cache after a row. Uniform
windows are left out where they see a whole row.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import subquad
from scripts.quantized import with_torchao
from subquad.config import Data
from subquad.data import spread_rows, token_rows
from subquad.evaluate.perplexity import compare
from subquad.modeling.budget import calibration_shape
from subquad.modeling.cache import CACHE_ARGUMENT, cache_bytes
from subquad.utils import write_json_atomic

RESULTS = Path(__file__).resolve().parents[2] / "results" / "smollm2-135m" / "untrained.json"
TOKENS, BATCH = 16_384, 8


@torch.no_grad()
def full_cache(model: PreTrainedModel, tokens: int) -> int:
    out = model(input_ids=torch.arange(tokens)[None], use_cache=True, logits_to_keep=1)
    return cache_bytes(out[CACHE_ARGUMENT])


def models(
    args: argparse.Namespace, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, PreTrainedModel, int | None]]:
    """Names, models, and the tokens that a model sees, if it is a uniform window."""
    for window in args.windows:
        layers = {"default": {"mixer": "attention", "window": window, "sinks": args.sinks}}
        name = f"window {window} + {args.sinks} sinks"
        yield name, subquad.linearize(teacher, layer_types=layers), window + args.sinks
    books = Data(source=str(args.directory / "books.txt"))
    ids = spread_rows(books, tokenizer, *calibration_shape(teacher)) if args.budgets else None
    for budget in args.budgets:
        yield f"windows by error {budget}", subquad.linearize(teacher, budget=str(budget), calibration_ids=ids), None
    for bits in args.bits:
        yield f"teacher, weights int{bits}", with_torchao(teacher, bits)[0], None


def text_batches(source: str, tokenizer: PreTrainedTokenizerBase, length: int) -> list[dict[str, torch.Tensor]]:
    data = Data(source=source, validation=source, seq_len=length)
    rows = token_rows(data, tokenizer, "validation", limit=TOKENS + length, seed=0)
    return list(DataLoader(rows.take(math.ceil(TOKENS / length)), batch_size=BATCH))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: [int(number) for number in text.split(",") if number]  # noqa: E731
    parser.add_argument("directory", type=Path)
    parser.add_argument("--windows", type=numbers, default=[32, 64, 96, 192, 384], metavar="LIST")
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--budgets", type=numbers, default=[32, 64, 96], metavar="LIST")
    parser.add_argument("--bits", type=numbers, default=[8, 4], metavar="LIST")
    parser.add_argument("--seq-len", type=numbers, default=[256, 512], metavar="LIST")
    args = parser.parse_args()
    teacher, tokenizer = subquad.load_teacher("smollm2-135m")
    source, found = str(args.directory / "test/books.txt"), json.loads(RESULTS.read_text())
    batches = {length: text_batches(source, tokenizer, length) for length in args.seq_len}
    for name, model, seen in models(args, teacher, tokenizer):
        for length in args.seq_len:
            if seen is not None and seen >= length:
                continue
            quality = compare(model, teacher, batches[length])
            row = {"seq_len": length, "model": name, "teacher_loss": quality["teacher_loss"]}
            row |= {"loss_above_teacher": quality["loss"] - quality["teacher_loss"], "kl": quality["kl"]}
            row |= {"top1_agreement": quality["top1_agreement"], "cache_bytes": full_cache(model, length)}
            found = [old for old in found if (old["seq_len"], old["model"]) != (length, name)] + [row]
            print(json.dumps(row), flush=True)
            write_json_atomic(RESULTS, found)


if __name__ == "__main__":
    main()
