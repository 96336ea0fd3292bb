"""What a user would do instead of taking a student: the teacher in int8, and the teacher with a sliding window."""

import copy
import importlib.util

import torch.nn as nn
from transformers import PreTrainedModel

from subquad.modeling.linearize import linearize
from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import UserError

SINKS = 4


def int8_teacher(teacher: PreTrainedModel) -> PreTrainedModel:
    """A copy whose linear layers hold their weights in 8 bits, a scale a row (`torchao`, weight-only).

    Raises:
        UserError: `torchao` is not installed.
    """
    if importlib.util.find_spec("torchao") is None:
        raise UserError("the teacher in int8 needs torchao; pip install 'subquad[eval]'")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized = copy.deepcopy(teacher)
    head = quantized.get_output_embeddings()
    if head is not None:  # or a head that is tied to the embedding takes that with it
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    quantize_(quantized, Int8WeightOnlyConfig(version=2))
    return quantized


def windowed_teacher(teacher: PreTrainedModel, window: int, sinks: int = SINKS) -> SubquadForCausalLM:
    """The teacher with all of its attention cut to the last `window` tokens and the first `sinks`
    (arXiv 2309.17453)."""
    return linearize(teacher, layer_types={"default": {"mixer": "attention", "window": window, "sinks": sinks}}).eval()
