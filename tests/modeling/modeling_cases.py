"""Students of tiny random teachers, no gate of which is neutral."""

import hashlib

import torch
from torch import Tensor

import subquad
from subquad import SubquadForCausalLM, mixers
from subquad.modeling.layers import MixerLayer

ALL = mixers.names()
EIGHT = list(mixers.REGISTRY)
TEXT = torch.arange(3, 15)[None]
"""Calibration where it does not matter: quicker than tokens that the teacher writes itself."""


def shaken(student: SubquadForCausalLM, seed: int = 0) -> SubquadForCausalLM:
    """The student, every parameter of its mixers that no teacher has moved away from its neutral start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in student.mixer_layers:
            if not isinstance(block, MixerLayer):
                continue
            copied = {id(p) for p in block.projection_parameters()}
            for parameter in block.parameters():
                if id(parameter) not in copied:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * 0.3)
    return student


def student_of(teacher, mixer: str, **options) -> SubquadForCausalLM:
    return shaken(subquad.linearize(teacher, mixer, scale_ids=TEXT, **options))


def checksum(model) -> str:
    """Of every parameter and buffer, with names and dtypes."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def logits(model, ids: Tensor, **kwargs) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits
