"""What each mixer can hold, apart from any teacher: multi-query associative recall, learned from nothing in a minute.

The task is Zoology's (arXiv 2312.04927, section 3): a row of keys, each with its value behind it, then every key again,
in another order; after each, its value is to be said. Half of the vocabulary are keys, half values, so that nothing is
learned but to look up. The model is a small Llama, every attention of which is a mixer with no teacher's weights, and
`ALIKE` in all else: what differs is the memory. (With its output gate, Gated DeltaNet had learned a quarter of this
after as many steps as taught it nearly all without.)

How sizes were chosen: the state, H heads of K x K numbers a layer where H K is the width, is set by the number of heads
alone, at equal width and nearly equal parameters. From two heads to eight, K goes from twice as many directions as
there are pairs to half as many, so that what is added without being told apart interferes. The vocabulary is small,
because a row of the embedding must first be learned for each token, which tells no mixers apart; values are drawn anew
for every row, so that none is learned by heart. Weights start at a standard deviation of width^-1/2: at Llama's 0.02
nothing is learned in a minute. One learning rate serves all mixers: of 5e-3, 1e-2 and 2e-2, the one that taught
DeltaNet and GLA most in 400 steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from subquad import mixers
from subquad.evaluate.results import Result
from subquad.modeling.layers import MixerLayer
from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError, eval_mode

ALIKE: dict[str, Any] = {"short_conv": 4, "output_gate": "none", "half_life": 1024.0}
"""Options of every mixer: a convolution that shows a value the key before it, no gate, and nothing forgotten before a
mixer has learned to."""
WARMUP = 0.05
CHECKED = 256
"""Rows on which a trained model is measured."""


@dataclass(frozen=True)
class Setting:
    """A task and the training of one model on it."""

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
            raise UserError(f"heads: got {self.heads} for a width of {self.width}; expected heads of an even size")
        if not 0 < self.pairs <= self.vocabulary // 2:
            raise UserError(
                f"pairs: got {self.pairs} for a vocabulary of {self.vocabulary}; expected 1 to {self.vocabulary // 2}"
            )

    @property
    def state(self) -> int:
        """Numbers in the matrices of one layer."""
        return self.width**2 // self.heads

    @property
    def length(self) -> int:
        return 4 * self.pairs


def mqar_results(
    names: Sequence[str] = tuple(mixers.REGISTRY), heads: Sequence[int] = (2, 4, 8), setting: Setting | None = None
) -> list[Result]:
    """Accuracy of each mixer for each number of heads; the row's model is the mixer, its task names the state, in
    numbers a layer: `mqar_state_512`.

    Each row takes a training run of less than a minute.

    Raises:
        UserError: an unknown mixer; heads that do not divide the width.
    """
    setting = setting or Setting()
    found = []
    for name in names:
        for count in heads:
            one = replace(setting, heads=count)
            model = build(name, one)
            train(model, one)
            right, asked = accuracy(model, one)
            stderr = (right * (1 - right) / asked) ** 0.5
            task = f"mqar_state_{one.state}"
            found.append(
                Result(task=task, metric="acc", value=right, stderr=stderr, n=asked, length=one.length, model=name)
            )
    return found


def sequences(setting: Setting, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`[count, 4 * pairs]` tokens and, of the same shape, what each should be followed by: a value behind each key that
    is asked for, -100 elsewhere."""
    half, P = setting.vocabulary // 2, setting.pairs
    keys, values = (torch.rand(count, half, generator=generator).argsort(-1)[:, :P] for _ in range(2))
    order = torch.rand(count, P, generator=generator).argsort(-1)
    told = torch.stack([keys, values + half], dim=-1)
    asked = told.gather(1, order.unsqueeze(-1).expand(-1, -1, 2))
    tokens = torch.cat([told, asked], dim=1).flatten(1)
    targets = torch.full_like(tokens, -100)
    targets[:, 2 * P :: 2] = tokens[:, 2 * P + 1 :: 2]
    return tokens, targets


def build(mixer: str, setting: Setting) -> SubquadForCausalLM:
    """A fresh model of a mixer, or of softmax attention, with nothing of a teacher in it."""
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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(setting.seed)
        entry = {"mixer": mixer} | ({} if mixer == mixers.SOFTMAX else ALIKE)
        some = torch.arange(min(8, setting.vocabulary))[None]
        model = linearize(
            LlamaForCausalLM(config), copy_qkv=False, layer_types={"default": entry}, scale_ids=some, seed=setting.seed
        )
        for block in model.mixer_layers:
            if isinstance(block, MixerLayer):
                block.mixer.reset_parameters()  # output norms at one: there is no teacher whose scale they should have
    return model


def train(model: SubquadForCausalLM, setting: Setting) -> None:
    """AdamW on fresh sequences at every step, with a warm-up and a cosine."""
    generator = torch.Generator().manual_seed(setting.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.1)
    warm = max(1, round(WARMUP * setting.steps))
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warm, total_iters=warm),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, setting.steps - warm)),
        ],
        milestones=[warm],
    )
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


@torch.no_grad()
def accuracy(model: SubquadForCausalLM, setting: Setting) -> tuple[float, int]:
    """Share of the values that are the likeliest token where they are asked for, of sequences that training did not
    see, and of how many."""
    generator = torch.Generator().manual_seed(setting.seed + 1)
    tokens, targets = sequences(setting, CHECKED, generator)
    with eval_mode(model):
        guesses = torch.cat(
            [model(input_ids=t, use_cache=False).logits.argmax(-1) for t in tokens.split(setting.batch)]
        )
    asked = targets != -100
    return (guesses == targets)[asked].double().mean().item(), int(asked.sum())
