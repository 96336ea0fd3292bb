"""The recall capacity of each mixer without a teacher: multi-query associative recall, trained from scratch.

The task is that of Zoology (arXiv 2312.04927, section 3): keys, each followed by its value, then all keys again in
another order, each of which is to be followed by its value. Half of the vocabulary are keys, half values. The model is
a small Llama whose attention is replaced by a randomly initialized mixer; `SHARED_OPTIONS` are the same for all mixers,
which leaves the state as the difference. (With its output gate, Gated DeltaNet learns a quarter as much per step.)

Sizes: a layer's state is H heads of K x K elements with H K the width, so that the number of heads alone sets its size,
at nearly equal parameters. From two heads to eight, K goes from twice the number of pairs to half of it. The vocabulary
is small, because the embedding of each token must be learned first; values are redrawn for every sequence, so that none
can be memorized. Weights are initialized with standard deviation width^-1/2; with Llama's 0.02 nothing is learned in a
minute. As in Zoology, every mixer and size is trained at each of `RATES`. The best rate is chosen on sequences of their
own, and the reported accuracy is that on others.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import lr_scheduler
from transformers import LlamaConfig, LlamaForCausalLM

from subquad import mixers
from subquad.evaluate.results import Result
from subquad.modeling.layers import MixerLayer
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, eval_mode

SHARED_OPTIONS: dict[str, Any] = {"short_conv": 4, "output_gate": "none", "half_life": 1024.0}
"""Options of all mixers that have them. The convolution shows a value the key before it; the half-life keeps the state
at first."""
RATES = (5e-3, 1e-2, 2e-2, 4e-2)
"""Peak learning rates, of which the best is reported."""
WARMUP = 0.05
"""Share of the steps."""
EVAL_SEQUENCES = 256
"""Sequences that a rate is chosen on, and that the accuracy is measured on."""


@dataclass(frozen=True)
class MQARSettings:
    """Sizes of the task and the model, and training options."""

    pairs: int = 8
    vocabulary: int = 32
    width: int = 32
    heads: int = 2
    layers: int = 2
    steps: int = 400
    batch: int = 16
    lr: float = 1e-2
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % (2 * self.heads):
            raise UserError(f"heads: got {self.heads} for width {self.width}, expected heads of an even size")
        if not 0 < self.pairs <= self.vocabulary // 2:
            limit = self.vocabulary // 2
            raise UserError(f"pairs: got {self.pairs} for vocabulary {self.vocabulary}, expected 1 to {limit}")

    @property
    def state(self) -> int:
        """Numbers in the state of one layer."""
        return self.width**2 // self.heads

    @property
    def length(self) -> int:
        return 4 * self.pairs


def mqar_results(
    names: Sequence[str] = tuple(mixers.MIXERS),
    heads: Sequence[int] = (2, 4, 8),
    setting: MQARSettings | None = None,
    rates: Sequence[float] = RATES,
) -> list[Result]:
    """`acc` of each mixer for each number of heads at the best of the learning rates, and that rate as `lr`.

    A training run takes less than a minute. The result's model is the mixer; its task names the elements of a layer's
    state, as in `mqar_state_512`.

    Raises:
        UserError: an unknown mixer; heads that do not divide the width.
    """
    results = []
    for name, count in itertools.product(names, heads):
        sized = replace(setting or MQARSettings(), heads=count)
        models = {rate: train_model(build_model(name, sized), replace(sized, lr=rate)) for rate in rates}
        rate = max(rates, key=lambda rate: accuracy(models[rate], sized, "validation")[0])
        acc, n = accuracy(models[rate], sized, "test")
        make = partial(Result, f"mqar_state_{sized.state}", length=sized.length, model=name)
        results += [make("acc", acc, (acc * (1 - acc) / n) ** 0.5, n=n), make("lr", rate)]
    return results


def sequences(setting: MQARSettings, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Token ids `[count, 4 * pairs]`, and targets of the same shape: the value at each key of the second half, else
    -100."""
    half, P = setting.vocabulary // 2, setting.pairs
    keys, values = (torch.rand(count, half, generator=generator).argsort(-1)[:, :P] for _ in range(2))
    order = torch.rand(count, P, generator=generator).argsort(-1)
    pairs = torch.stack([keys, values + half], dim=-1)
    queried = pairs.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    tokens = torch.cat([pairs, queried], dim=1).flatten(1)
    targets = torch.full_like(tokens, -100)
    targets[:, 2 * P :: 2] = tokens[:, 2 * P + 1 :: 2]
    return tokens, targets


def build_model(mixer: str, setting: MQARSettings) -> SubquadForCausalLM:
    """A randomly initialized model with a mixer, or with softmax attention."""
    config = LlamaConfig(
        vocab_size=setting.vocabulary,
        hidden_size=setting.width,
        intermediate_size=2 * setting.width,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        max_position_embeddings=setting.length,
        initializer_range=setting.width**-0.5,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    options = mixers.OPTIONS.get(mixer)
    shared = {name: value for name, value in SHARED_OPTIONS.items() if hasattr(options, name)}
    ids = torch.arange(min(8, setting.vocabulary))[None]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        random_llama = LlamaForCausalLM(config)
        layer_types = {"default": {"mixer": mixer, **shared}}
        model = linearize(random_llama, copy_qkv=False, layer_types=layer_types, scale_ids=ids, seed=setting.seed)
        for layer in model.mixer_layers:
            if isinstance(layer, MixerLayer):
                layer.mixer.reset_parameters()  # output norms at 1 instead of the scale of random attention
    return model


def train_model(model: SubquadForCausalLM, setting: MQARSettings) -> SubquadForCausalLM:
    """Trains `model` and returns it: AdamW on new sequences in every step, with linear warmup and cosine decay."""
    generator = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.1)
    steps = max(1, round(WARMUP * setting.steps))
    warmup = lr_scheduler.LinearLR(optimizer, 1 / steps, total_iters=steps)
    decay = lr_scheduler.CosineAnnealingLR(optimizer, max(1, setting.steps - steps))
    schedule = lr_scheduler.SequentialLR(optimizer, [warmup, decay], milestones=[steps])
    model.train()
    for _ in range(setting.steps):
        tokens, targets = sequences(setting, setting.batch, generator)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def accuracy(
    model: SubquadForCausalLM, setting: MQARSettings, split: Literal["validation", "test"] = "test"
) -> tuple[float, int]:
    """The share of queried values that the model predicts, on sequences not seen in training, and their number."""
    generator = torch.Generator().manual_seed(setting.seed + (1 if split == "test" else 2))
    tokens, targets = sequences(setting, EVAL_SEQUENCES, generator)
    with eval_mode(model):
        logits = [model(input_ids=ids, use_cache=False).logits for ids in tokens.split(setting.batch)]
    queried = targets != -100
    right = (torch.cat(logits).argmax(-1) == targets)[queried]
    return right.double().mean().item(), len(right)
