"""Students of tiny random teachers, with random gates."""

import hashlib

import torch
from torch import Tensor

import subquad
from subquad import SubquadForCausalLM, mixers
from subquad.modeling.layers import MixerLayer

MIXERS_AND_SOFTMAX = mixers.names()
MIXERS = list(mixers.MIXERS)
SCALE_IDS = torch.arange(3, 15)[None]
"""For tests in which the scales do not matter; the default, tokens sampled from the teacher, is slower."""


def randomize_gates(student: SubquadForCausalLM, seed: int = 0) -> SubquadForCausalLM:
    """Adds noise to every parameter of the mixers that is not copied from the teacher: gates, convolutions, norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in student.mixer_layers:
            if not isinstance(layer, MixerLayer):
                continue
            copied = {id(p) for p in layer.projection_parameters()}
            for parameter in layer.parameters():
                if id(parameter) not in copied:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return student


def make_student(teacher, mixer: str = "gla", **options) -> SubquadForCausalLM:
    return randomize_gates(subquad.linearize(teacher, mixer, scale_ids=SCALE_IDS, **options))


def checksum(model) -> str:
    """SHA-256 of all parameters and buffers with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logits(model, ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def all_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether no difference exceeds `tolerance` times the largest expected value, or times one."""
    return float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))
