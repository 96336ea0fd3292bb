"""Trains the nano teacher: tokenizer and model, on the text of the Python standard library.

    python scripts/train_nano.py --output subquad/nano

A Llama of 3.1 million parameters with grouped-query attention and a context of 1,024, Muon on its matrices and AdamW
on the rest, warm-up, constant rate, then linear decay to zero. Writes `tokenizer.json`, `model.safetensors` (bfloat16),
the configuration and `train_log.jsonl`; a checkpoint beside the output lets a second run continue a first.
"""

import argparse
import json
import math
import platform
import random
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from subquad.data.corpora import read
from subquad.data.sources import resolve

EOS = "<|endoftext|>"
CONTEXT = 1024


def stdlib_texts(split: str) -> list[str]:
    """The files of the standard library in a split, in alphabetical order."""
    source = resolve("python-stdlib", part=split)
    return list(read(replace(source, files=tuple(sorted(source.files)))))


def train_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=EOS, model_max_length=CONTEXT
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """All documents one after the other, each behind an end-of-text token."""
    eos = tokenizer.eos_token_id
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return torch.tensor([token for row in rows for token in (eos, *row)])


def nano_config(vocab: int, eos: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=eos,
        eos_token_id=eos,
        pad_token_id=eos,
        initializer_range=0.02,
    )


def shuffled_windows(tokens: torch.Tensor, batch: int, epochs: float, seed: int):
    """Batches `[batch, CONTEXT + 1]`; every epoch cuts the text elsewhere and takes its windows in another order."""
    generator = random.Random(seed)
    total = int(epochs * len(tokens))
    seen = 0
    while seen < total:
        shift = generator.randrange(CONTEXT)
        starts = list(range(shift, len(tokens) - CONTEXT - 1, CONTEXT))
        generator.shuffle(starts)
        for i in range(0, len(starts) - batch + 1, batch):
            yield torch.stack([tokens[s : s + CONTEXT + 1] for s in starts[i : i + batch]])
            seen += batch * CONTEXT
            if seen >= total:
                return


@torch.no_grad()
def losses_by_position(model, tokens: torch.Tensor, batch: int = 8, windows: int | None = None) -> torch.Tensor:
    """Validation loss in nats at each of the CONTEXT positions, a mean over windows."""
    starts = range(0, len(tokens) - CONTEXT - 1, CONTEXT)
    starts = list(starts)[:windows]
    total = torch.zeros(CONTEXT)
    for i in range(0, len(starts), batch):
        rows = torch.stack([tokens[s : s + CONTEXT + 1] for s in starts[i : i + batch]])
        logits = model(input_ids=rows[:, :-1]).logits
        total += (
            F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="none")
            .view(len(rows), CONTEXT)
            .sum(0)
        )
    return total / len(starts)


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan, 2024), in float32: `torch.optim.Muon` works in bfloat16, which
    a CPU without that arithmetic runs hundreds of times slower."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                update = self.orthogonalized(p.grad.lerp(buffer, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[0] / p.shape[1]) ** 0.5)

    @staticmethod
    def orthogonalized(g: torch.Tensor) -> torch.Tensor:
        x = g if g.shape[0] <= g.shape[1] else g.T
        x = x / (x.norm() + 1e-7)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        return x if g.shape[0] <= g.shape[1] else x.T


def optimizers(model) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    rest = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0, eps=1e-10),
    ]


def rate(step: int, steps: int) -> float:
    warm, decay = 40, 0.5
    return min((step + 1) / warm, 1.0, (steps - step) / (decay * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=12, help="windows a step")
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    args.output.mkdir(parents=True, exist_ok=True)

    if (args.output / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.output)
    else:
        tokenizer = train_tokenizer(stdlib_texts("train"), args.vocab)
        tokenizer.save_pretrained(args.output)
    train, valid = (encode(tokenizer, stdlib_texts(split)) for split in ("train", "validation"))
    model = LlamaForCausalLM(nano_config(len(tokenizer), tokenizer.eos_token_id))
    parameters = sum(p.numel() for p in model.parameters())
    steps = math.ceil(args.epochs * len(train) / (args.batch * CONTEXT))
    print(f"{parameters:,} parameters, {len(train):,} training and {len(valid):,} validation tokens, {steps} steps")

    opts = optimizers(model)
    base = [[g["lr"] for g in opt.param_groups] for opt in opts]
    first, spent = 0, 0.0
    resume = args.output.with_name(args.output.name + ".train.pt")
    if resume.exists():
        saved = torch.load(resume)
        model.load_state_dict(saved["model"])
        for opt, state in zip(opts, saved["opts"], strict=True):
            opt.load_state_dict(state)
        first, spent = saved["step"], saved["seconds"]
    log = (args.output / "train_log.jsonl").open("a" if first else "w")
    start = time.time() - spent
    for step, rows in enumerate(shuffled_windows(train, args.batch, args.epochs, args.seed)):
        if step < first:
            continue
        for opt, rates in zip(opts, base, strict=True):
            for group, lr in zip(opt.param_groups, rates, strict=True):
                group["lr"] = lr * rate(step, steps)
        loss = F.cross_entropy(model(input_ids=rows[:, :-1]).logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        row = {"step": step + 1, "tokens": (step + 1) * args.batch * CONTEXT, "loss": round(loss.item(), 4)}
        if (step + 1) % 100 == 0 or step + 1 == steps:
            row["valid_loss"] = round(losses_by_position(model, valid, windows=48).mean().item(), 4)
            torch.save(
                {
                    "model": model.state_dict(),
                    "opts": [opt.state_dict() for opt in opts],
                    "step": step + 1,
                    "seconds": time.time() - start,
                },
                resume,
            )
        row["seconds"] = round(time.time() - start, 1)
        if (step + 1) % 10 == 0 or "valid_loss" in row:
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(json.dumps(row), flush=True)

    model.to(torch.bfloat16).save_pretrained(args.output)
    by_position = losses_by_position(model.float(), valid)
    summary = {
        "parameters": parameters,
        "train_tokens": len(train),
        "epochs": args.epochs,
        "valid_loss": round(by_position.mean().item(), 4),
        "valid_loss_at_32_63": round(by_position[32:64].mean().item(), 4),
        "valid_loss_at_768_1023": round(by_position[768:].mean().item(), 4),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    log.write(json.dumps(summary) + "\n")
    print(json.dumps(summary))
    resume.unlink()


if __name__ == "__main__":
    main()
