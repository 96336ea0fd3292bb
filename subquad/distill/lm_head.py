"""How a model computes logits from its last hidden states: a `Head`, read off a loaded model by `read_head`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.modeling_subquad import SubquadForCausalLM


class Head(NamedTuple):
    """logits = scale * (h W^T + b) or, with a softcap c, c tanh(scale * (h W^T + b) / c)."""

    weight: Tensor
    """`[vocabulary, D]`, the parameter itself."""
    bias: Tensor | None = None
    """`[vocabulary]`"""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """Maps `[..., D]` to `[..., vocabulary]`."""
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names in configurations of a factor or a divisor of the logits."""
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
_ROWS, _TOKENS = 2, 8


def read_head(model: PreTrainedModel) -> Head | None:
    """The head that follows the backbone of `model`; None if the logits are not those of a `Head`.

    The backbone is `model.base_model`, or that of the student's base model. Candidates come from the output embeddings
    and the names in the configuration. Each candidate is checked numerically: the model's forward runs with random
    hidden states of two magnitudes in place of its backbone's, and must return the candidate's logits. Besides the
    head, no parameter may influence the logits behind the backbone, not even one whose effect is zero now (a low-rank
    update of the head, a learned scale).
    """
    causal_lm: PreTrainedModel = model.base if isinstance(model, SubquadForCausalLM) else model
    output = model.get_output_embeddings()
    weight: Any = getattr(output, "weight", None)
    bias: Tensor | None = getattr(output, "bias", None)
    # quantized, sharded and offloaded weights have other types
    if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 2 or weight.is_meta:
        return None
    if not weight.is_floating_point() or causal_lm.base_model is causal_lm:
        return None
    with _restore_state(model):
        # the first tokens of a vocabulary are often special
        tokens = (3 + torch.arange(_ROWS * _TOKENS, device=weight.device)).view(_ROWS, _TOKENS) % len(weight)
        if not _head_follows_backbone(model, causal_lm, tokens):
            return None
        probes = _probes(weight)
        logits = [x for h in probes if (x := _logits_from(model, causal_lm, tokens, h)) is not None]
        if len(logits) < len(probes):
            return None
        for head in _candidates(weight, bias, causal_lm.config.get_text_config()):
            if all(_close(head.logits(h), x) for h, x in zip(probes, logits, strict=True)):
                return head if _depends_on_head_alone(logits[0], head, causal_lm) else None
    return None


def _candidates(weight: Tensor, bias: Tensor | None, config: Any) -> Iterator[Head]:
    values = [getattr(config, name, None) for name in _SCALES]
    factors = [float(x) for x in values if isinstance(x, int | float) and x]
    caps = [getattr(config, name, None) for name in _SOFTCAPS]
    for cap in [*(float(x) for x in caps if x), None]:
        for factor in factors:
            yield Head(weight, bias, factor, cap)
            yield Head(weight, bias, 1 / factor, cap)
        yield Head(weight, bias, 1.0, cap)


@contextmanager
def _restore_state(model: PreTrainedModel) -> Iterator[None]:
    """Sets `requires_grad` on all parameters; on exit restores it, the modes of all modules and the random state."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            for p, _ in flags:
                p.requires_grad_(True)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, flag in flags:
            p.requires_grad_(flag)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the dtype."""
    a, b = a.detach(), b.detach()
    tolerance = max(1e-4, 4 * torch.finfo(b.dtype).eps) * float(b.abs().max().clamp_min(1e-6))
    return a.shape == b.shape and bool(((a.float() - b.float()).abs() <= tolerance).all())


def _hidden_of(output: Any) -> Tensor | None:
    hidden = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else None)
    return hidden if isinstance(hidden, Tensor) else None


def _head_follows_backbone(model: PreTrainedModel, causal_lm: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether the logits stay the same when the backbone's output is replaced by a copy of itself."""
    model.eval()
    with torch.no_grad():
        hidden = _hidden_of(causal_lm.base_model(input_ids=tokens, use_cache=False))
        if isinstance(model, SubquadForCausalLM):
            hidden = model.last_hidden_state(tokens)
        width: int = model.get_output_embeddings().weight.shape[1]  # type: ignore[union-attr, index, assignment]
        if hidden is None or hidden.shape[:-1] != tokens.shape or hidden.shape[-1] != width:
            return False
        expected = model(input_ids=tokens, use_cache=False).logits
        logits = _logits_from(model, causal_lm, tokens, hidden)
        return logits is not None and _close(logits, expected)


def _probes(weight: Tensor) -> list[Tensor]:
    """Random hidden states whose logits have a standard deviation of 1, and of 100, at which any softcap shows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_ROWS, _TOKENS, weight.shape[1], generator=generator).to(weight)
    std = F.linear(hidden, weight.detach()).std().clamp_min(1e-6)
    return [hidden * (target / std) for target in (1, 100)]


def _logits_from(model: PreTrainedModel, causal_lm: PreTrainedModel, tokens: Tensor, hidden: Tensor) -> Tensor | None:
    """The model's logits if its backbone returned `hidden`; None if the backbone's output could not be replaced.

    Runs in training mode, so that dropout between backbone and head would show.
    """
    replaced = False

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal replaced
        if _hidden_of(output) is None:
            return output
        replaced = True
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output.last_hidden_state = hidden
        return output

    # OPT calls the decoder inside its backbone, not the backbone
    backbones = {id(module): module for module in (causal_lm.base_model, causal_lm.get_decoder()) if module is not None}
    hooks = [module.register_forward_hook(replace) for module in backbones.values()]
    try:
        model.train()
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits if replaced else None


def _depends_on_head_alone(logits: Tensor, head: Head, causal_lm: PreTrainedModel) -> bool:
    own = {id(head.weight), id(head.bias)}
    others = [p for p in causal_lm.parameters() if p.requires_grad and id(p) not in own]
    if not others:
        return True
    gradients = torch.autograd.grad(logits.sum(), others, allow_unused=True)
    return all(gradient is None for gradient in gradients)
