"""Errors of single layers: the output error of each student layer on the teacher's inputs, and the effect of swapping
one layer into the teacher.

Neither sums to the student's error: in the student, a layer's input contains the errors of the layers before it.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from subquad.analysis.layer_access import layer_access_pair, run_on
from subquad.evaluate.perplexity import prediction_sums
from subquad.evaluate.results import Result
from subquad.utils import eval_mode

TASK = "layer errors"


def layer_error_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """`output_error_results` and `swap_results` on texts `rows: [N, T]`."""
    return output_error_results(student, teacher, rows) + swap_results(student, teacher, rows)


@torch.no_grad()
def output_error_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """|student - teacher|^2 / |teacher|^2 of each layer's outputs on the teacher's inputs, summed over all tokens.

    `mixer_error`: of the mixer against the attention; a mixer whose output is zero has 1.
    `layer_error`: of the whole decoder layer, with residual stream and MLP.
    """
    student_layers, teacher_layers = layer_access_pair(student, teacher)
    error, power = (torch.zeros(2, len(student_layers), dtype=torch.float64) for _ in range(2))
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            recorded = [
                teacher_layers.record(modules, ids)
                for modules in (teacher_layers.mixing_modules, teacher_layers.decoder_layers)
            ]
            with student_layers.installed():
                for kind, modules in enumerate((student_layers.mixing_modules, student_layers.decoder_layers)):
                    for index, (module, activations) in enumerate(zip(modules, recorded[kind], strict=True)):
                        target = activations.output.double()
                        error[kind, index] += (run_on(module, activations).double() - target).square().sum().cpu()
                        power[kind, index] += target.square().sum().cpu()
    errors = (error / power).tolist()
    return results_by_layer("mixer_error", errors[0], rows) + results_by_layer("layer_error", errors[1], rows)


@torch.no_grad()
def swap_results(student: PreTrainedModel, teacher: PreTrainedModel, rows: Tensor) -> list[Result]:
    """The effect of replacing one decoder layer of the teacher by the student's, for each layer, in nats per token:
    `swap_kl`, the KL divergence from the teacher's next-token distribution, and `swap_loss`, the increase in loss."""
    student_layers, teacher_layers = layer_access_pair(student, teacher)
    totals = torch.zeros(2, len(student_layers), dtype=torch.float64)
    with eval_mode(student), eval_mode(teacher):
        for ids in rows.split(1):
            ids = ids.to(teacher.device)
            unchanged = next_token_logits(teacher, ids)
            for index in range(len(student_layers)):
                with student_layers.installed(), teacher_layers.with_layer(index, student_layers):
                    swapped = next_token_logits(teacher, ids)
                _, loss, _, teacher_loss, kl, _, _ = prediction_sums(swapped, unchanged, ids[0, 1:])
                totals[:, index] += torch.stack([kl, loss - teacher_loss])
    values = (totals / rows[:, 1:].numel()).tolist()
    return results_by_layer("swap_kl", values[0], rows) + results_by_layer("swap_loss", values[1], rows)


def next_token_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits `[T - 1, vocab]` for all tokens but the first of `ids: [1, T]`."""
    return model(input_ids=ids, use_cache=False).logits[0, :-1]


def results_by_layer(metric: str, values: list[float], rows: Tensor) -> list[Result]:
    """The mean over layers (a result without layer), then each layer's value."""
    fields: dict[str, Any] = {"length": rows.shape[1], "n": rows.numel()}
    mean = Result(TASK, metric, sum(values) / len(values), **fields)
    return [mean, *(Result(TASK, metric, value, layer=index, **fields) for index, value in enumerate(values))]
