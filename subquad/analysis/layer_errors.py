"""Where in the stack a student's error arises: each of its layers on the teacher's input, and alone in the teacher.

The first says how wrong a layer is by itself; the second what that costs where everything else is right. Neither is
the student's error, which its layers make together: later ones see what earlier ones did, and may have learned to live
with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.layer_access import run_on, stacks
from subquad.evaluate.results import Result
from subquad.utils import eval_mode

CHUNK = 256
"""Tokens whose distributions over the vocabulary are compared at a time."""


def layer_error_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """What `error_rows` and `swap_rows` say of texts `rows: [N, T]`."""
    return output_error_results(student, teacher, rows) + swap_results(student, teacher, rows)


@torch.no_grad()
def output_error_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """Of each layer, given what the teacher's is given: |ours - theirs|^2 / |theirs|^2, summed over all tokens.

    `mixer_error`: of what stands in the place of attention, on attention's input; 1 is one that says nothing.
    `layer_error`: of the whole decoder layer, residual stream and MLP included, on its input.
    """
    ours, theirs = stacks(student, teacher)
    wrong, power = (torch.zeros(2, len(ours), dtype=torch.float64) for _ in range(2))
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            heard = [theirs.record(modules, ids) for modules in (theirs.mixing, theirs.layers)]
            with ours.installed():
                for kind, modules in enumerate((ours.mixing, ours.layers)):
                    for index, (module, recording) in enumerate(zip(modules, heard[kind], strict=True)):
                        target = recording.output.double()
                        wrong[kind, index] += (run_on(module, recording).double() - target).square().sum().cpu()
                        power[kind, index] += target.square().sum().cpu()
    errors = (wrong / power).tolist()
    return by_layer("mixer_error", errors[0], rows) + by_layer("layer_error", errors[1], rows)


@torch.no_grad()
def swap_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """What it costs the teacher to have one decoder layer of the student in the place of its own: `swap_kl`, the
    divergence from its own distribution of the next token, and `swap_loss`, by how much its loss rises; in nats."""
    ours, theirs = stacks(student, teacher)
    totals = torch.zeros(2, len(ours), dtype=torch.float64)
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            ids = ids.to(teacher.device)
            whole = next_logits(teacher, ids)
            for index in range(len(ours)):
                with ours.installed(), theirs.with_layer(index, ours):
                    swapped = next_logits(teacher, ids)
                totals[:, index] += divergence(whole, swapped, ids[0, 1:])
    values = (totals / rows[:, 1:].numel()).tolist()
    return by_layer("swap_kl", values[0], rows) + by_layer("swap_loss", values[1], rows)


def next_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of every token of a text `ids: [1, T]` that has one before it, `[T - 1, vocabulary]`."""
    return model(input_ids=ids, use_cache=False).logits[0, :-1]


def divergence(p: Tensor, q: Tensor, target: Tensor) -> Tensor:
    """KL divergence of q from p, and the cross-entropy of q less that of p, both summed over tokens, from logits
    `[tokens, vocabulary]`, some tokens at a time: `[2]` in float64."""
    total = torch.zeros(2, dtype=torch.float64)
    for a, b, t in zip(p.split(CHUNK), q.split(CHUNK), target.split(CHUNK), strict=True):
        log_p, log_q = F.log_softmax(a.double(), dim=-1), F.log_softmax(b.double(), dim=-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        total += torch.stack([kl, F.nll_loss(log_q, t, reduction="sum") - F.nll_loss(log_p, t, reduction="sum")]).cpu()
    return total


def by_layer(metric: str, values: list[float], rows: Tensor) -> list[Result]:
    """Of each layer, and their mean, which names none."""
    length = rows.shape[1]
    found = [Result(task="origins", metric=metric, value=sum(values) / len(values), length=length, n=rows.numel())]
    return found + [
        Result(task="origins", metric=metric, value=value, layer=index, length=length, n=rows.numel())
        for index, value in enumerate(values)
    ]
