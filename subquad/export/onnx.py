"""A student without attention as ONNX: one token a call, the states as inputs and outputs.

    input_ids, position_ids [1, 1] int64; state_0, state_1, ... [1, ...]
    -> logits [1, 1, vocabulary]; next_state_0, next_state_1, ...

One sequence: the exporter fixes the size of the batch. All states are zeros before the first token. Their number and
shapes do not depend on the length of the text.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from subquad.export.converter import TOLERANCE, random_tokens, relative_error, rounding_error
from subquad.modeling.cache import RecurrentCacheLayer
from subquad.modeling.export_target import ExportError
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import eval_mode, quiet_libraries

MODEL, DESCRIPTION = "model.onnx", "subquad.json"
CHECKED_TOKENS = 24


def exact_operators() -> dict[Any, Any]:
    """Translations, for decays near one, of what the exporter writes as exp(x) - 1 and log(sigmoid(x))."""
    from onnxscript import opset18 as op

    def expm1(x: Any) -> Any:
        half = op.Mul(narrow(x), op.Constant(value_float=0.5))
        return op.CastLike(op.Mul(op.Mul(op.Sinh(half), op.Exp(half)), op.Constant(value_float=2.0)), x)

    def log_sigmoid(x: Any) -> Any:
        return op.CastLike(op.Neg(op.Softplus(op.Neg(narrow(x)))), x)

    def narrow(x: Any) -> Any:  # onnxruntime has no Sinh and Softplus of float64, in which xLSTM's gates are
        return op.Cast(x, to=1)

    aten = torch.ops.aten
    return {aten.expm1.default: expm1, aten.log_sigmoid.default: log_sigmoid}


class Step(nn.Module):
    """One token of a student: logits and new states from a token, its position and all states."""

    def __init__(self, student: SubquadForCausalLM) -> None:
        super().__init__()
        self.student = student
        self.counts: list[int] = []
        """Number of states of each layer."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        cache, waiting = self.student.new_cache(), list(states)
        layers: list[Any] = cache.layers
        for layer, count in zip(layers, self.counts, strict=True):
            layer.states, layer.num_tokens = tuple(waiting[:count]), 1
            del waiting[:count]
        out = self.student(input_ids=input_ids, position_ids=position_ids, past_key_values=cache)
        return out.logits, *(state for layer in layers for state in layer.states)


@torch.no_grad()
def initial_states(step: Step) -> list[Tensor]:
    """Zeros of the shapes of a student's states, for one sequence; sets `step.counts`.

    Raises:
        ExportError: a layer holds something else than states of a mixer.
    """
    student = step.student
    cache = student.new_cache()
    student(input_ids=torch.zeros(1, 1, dtype=torch.long, device=student.device), past_key_values=cache)
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if type(layer) is not RecurrentCacheLayer:
            raise ExportError(f"layer {index} keeps attention, whose cache grows with the text")
    states: list[tuple[Tensor, ...]] = [layer.states for layer in layers]
    step.counts = [len(of_layer) for of_layer in states]
    return [torch.zeros_like(state) for of_layer in states for state in of_layer]


@torch.no_grad()
def check(student: SubquadForCausalLM, run: Any, states: list[Tensor]) -> None:
    """Compares `run`, of one token and the states as numpy arrays, with the student on a random text."""
    ids = random_tokens(student)[:1, :CHECKED_TOKENS]
    found, values = [], [state.numpy() for state in states]
    for position in range(ids.shape[1]):
        logits, *values = run(ids[:, position : position + 1].numpy(), torch.tensor([[position]]).numpy(), *values)
        found.append(torch.from_numpy(logits))
    expected = student(input_ids=ids, use_cache=False).logits
    error = relative_error(torch.cat(found, dim=1), expected)
    if not error < max(TOLERANCE, 3 * rounding_error(student, ids)):
        raise ExportError(f"the relative error of the new model's logits is {error:.1e}")


def write_onnx(student: SubquadForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes the model, its description and the tokenizer's files to a new directory, in float32.

    Raises:
        ExportError: layers that keep attention; an operator that ONNX does not have; other logits than the student's.
    """
    import onnxruntime

    quiet_libraries()
    student = student.float().cpu()
    with eval_mode(student):
        step = Step(student).eval()
        states = initial_states(step)
        names = [f"state_{i}" for i in range(len(states))]
        token, position = (torch.zeros(1, 1, dtype=torch.long) for _ in range(2))  # one tensor would be one input
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                program = torch.onnx.export(
                    step,
                    (token, position, *states),
                    dynamo=True,
                    custom_translation_table=exact_operators(),
                    optimize=False,  # its rewriting changes the logits by 3e-3
                    verbose=False,
                    input_names=["input_ids", "position_ids", *names],
                    output_names=["logits", *(f"next_{name}" for name in names)],
                )
        except torch.onnx.OnnxExporterError as error:
            raise ExportError(f"torch.onnx cannot export it: {error}") from error
        directory.mkdir()
        assert program is not None
        program.save(str(directory / MODEL))
        session = onnxruntime.InferenceSession(str(directory / MODEL), providers=["CPUExecutionProvider"])
        keys = [value.name for value in session.get_inputs()]
        check(student, lambda *values: session.run(None, dict(zip(keys, values, strict=True))), states)
    tokenizer.save_pretrained(directory)
    end = student.generation_config.eos_token_id
    description = {
        "states": {name: list(state.shape) for name, state in zip(names, states, strict=True)},
        "eos_token_ids": [end] if isinstance(end, int) else list(end or ()),
    }
    (directory / DESCRIPTION).write_text(json.dumps(description))
