"""Students of tiny random teachers, with random gates."""

import hashlib
import itertools

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import subquad
from subquad import SubquadForCausalLM, mixers
from subquad.modeling.layers import MixerLayer
from subquad.modeling.near_far import NearFarLayer

MIXERS_AND_SOFTMAX = mixers.names()
MIXERS = list(mixers.MIXERS)
SCALE_IDS = torch.arange(3, 15)[None]
KINDS: dict[str, dict] = {
    "pure": {"default": "gated_deltanet"},
    "xlstm": {"default": "xlstm"},
    "hybrid": {"default": "gla", "1": "attention"},
    "window": {"default": {"mixer": "attention", "window": [3, 5], "sinks": 2}},
    "near_far": {"default": {"mixer": "mamba2", "window": 5, "sinks": 2}},
    "softmax": {"default": "softmax"},
}
"""Layer types of a student of each kind, for teachers with two key/value heads."""
"""For tests in which the scales do not matter; the default, tokens sampled from the teacher, is slower."""


def randomize_gates(student: SubquadForCausalLM, seed: int = 0, noise: float = 0.3) -> SubquadForCausalLM:
    """Adds noise to every parameter of the mixers that is not copied from the teacher: gates, convolutions, norms, and
    the shares of memories beside attention."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in student.mixer_layers:
            if not isinstance(layer, MixerLayer | NearFarLayer):
                continue
            copied = {id(p) for p in layer.projection_parameters()}
            for parameter in layer.parameters():
                if id(parameter) not in copied:
                    parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter) * noise)
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


def in_pieces(model, ids: Tensor, sizes: list[int]) -> Tensor:
    """The logits of `ids`, read `sizes` tokens at a time with a cache, which counts them."""
    cache = model.new_cache()
    pieces = [logits(model, piece, past_key_values=cache) for piece in ids.split(sizes, dim=1)]
    assert cache.get_seq_length() == ids.shape[1]
    return torch.cat(pieces, 1)


def reloaded(model, path, **options) -> PreTrainedModel:
    """`model`, saved in `path` and loaded."""
    model.save_pretrained(path)
    return AutoModelForCausalLM.from_pretrained(path, **options)


def check_padding(model, ids: Tensor, mask: Tensor, sizes: list[int]) -> None:
    """The logits of each row's real tokens are those of the row without padding: with the mask alone, with positions,
    and where `ids` are read `sizes` tokens at a time with a cache."""
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    ones_at_padding = positions.masked_fill(mask == 0, 1)
    pieces = list(zip(itertools.accumulate(sizes), ids.split(sizes, 1), positions.split(sizes, 1), strict=True))
    variants = {name: [] for name in ("pieces", "pieces with positions")}
    for (name, found), cache in zip(variants.items(), (model.new_cache(), model.new_cache()), strict=True):
        for end, piece, own in pieces:
            given = {} if name == "pieces" else {"position_ids": own}
            found.append(logits(model, piece, attention_mask=mask[:, :end], past_key_values=cache, **given))
    for name, given in (("mask", None), ("positions", positions), ("ones at padding", ones_at_padding)):
        variants[name] = [logits(model, ids, attention_mask=mask, position_ids=given)]
    for row, real in enumerate(mask.bool()):
        alone = logits(model, ids[row : row + 1, real])[0]
        for name, found in variants.items():
            assert all_close(torch.cat(found, 1)[row, real], alone), name


def check_gradient_checkpointing(model, ids: Tensor, tolerance: float) -> None:
    """The gradients with checkpointing are those without."""
    gradients = []
    for checkpointing in (False, True):
        model.train().zero_grad()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert any(getattr(module, "gradient_checkpointing", False) for module in model.base.modules())
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([torch.zeros(()) if p.grad is None else p.grad.clone() for p in model.parameters()])
    for expected, found in zip(*gradients, strict=True):
        assert all_close(found, expected, tolerance)


def all_close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether no difference exceeds `tolerance` times the largest expected value, or times one."""
    return float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))
