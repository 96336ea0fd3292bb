"""How a model computes logits from its last hidden states: a `Head`, read off a loaded model by `read_head`."""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.modeling.modeling_subquad import SubquadForCausalLM
from subquad.utils import eval_mode


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


def last_outputs(model: PreTrainedModel, head: Head | None, input_ids: Tensor, positions: Tensor | None) -> Tensor:
    """The last hidden states of a model, `[B, T, D]`, or its logits if `head` is None."""
    inputs = {"input_ids": input_ids, **({} if positions is None else {"position_ids": positions})}
    if head is None:
        return model(use_cache=False, **inputs).logits
    return model.base_model(use_cache=False, **inputs).last_hidden_state


_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names in configurations of a factor or a divisor of the logits."""
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
_ROWS, _TOKENS = 2, 8


def read_head(model: PreTrainedModel) -> Head | None:
    """The head that follows the backbone of `model`; None if the logits are not those of a `Head`.

    The backbone is `model.base_model`, or that of the student's base model. Candidates come from the output embeddings
    and the names in the configuration. Each candidate is checked numerically: it must return the model's logits from
    its last hidden states, and from random hidden states of two magnitudes in place of these. Besides the head, no
    parameter may influence the logits behind the backbone, not even one whose effect is zero now (a low-rank update of
    the head, a learned scale).
    """
    causal_lm: PreTrainedModel = model.base if isinstance(model, SubquadForCausalLM) else model
    output = model.get_output_embeddings()
    weight: Any = getattr(output, "weight", None)
    # quantized, sharded and offloaded weights have other types
    if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 2 or weight.is_meta:
        return None
    if not weight.is_floating_point() or causal_lm.base_model is causal_lm:
        return None
    candidates = _candidates(weight, getattr(output, "bias", None), causal_lm.config.get_text_config())
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    flags = [p.requires_grad for p in parameters]
    device = model.device.type
    try:
        with eval_mode(model), torch.random.fork_rng(), torch.autocast(device, enabled=False), torch.enable_grad():
            for p in parameters:
                p.requires_grad_(True)
            samples = _hidden_states_and_logits(model, causal_lm, weight)
            for head in candidates:
                if samples and all(_close(head.logits(hidden), logits) for hidden, logits in samples):
                    others = [p for p in parameters if p is not head.weight and p is not head.bias]
                    gradients = torch.autograd.grad(samples[-1][1].sum(), others, allow_unused=True)
                    return head if all(gradient is None for gradient in gradients) else None
    finally:
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
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


def _hidden_states_and_logits(
    model: PreTrainedModel, causal_lm: PreTrainedModel, weight: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of hidden states and the model's logits from them: its own, then random ones whose logits have a standard
    deviation of 1, and of 100, at which any softcap shows. Empty if they cannot take the place of the backbone's."""
    # the first tokens of a vocabulary are often special
    tokens = (3 + torch.arange(_ROWS * _TOKENS, device=weight.device)).view(_ROWS, _TOKENS) % len(weight)
    with torch.no_grad():
        own: Any = getattr(causal_lm.base_model(input_ids=tokens, use_cache=False), "last_hidden_state", None)
        if not isinstance(own, Tensor) or own.shape != (*tokens.shape, weight.shape[1]):
            return []
        samples = [(own, model(input_ids=tokens, use_cache=False).logits)]
    random = torch.randn(own.shape, generator=torch.Generator().manual_seed(0)).to(weight)
    std = F.linear(random, weight.detach()).std().clamp_min(1e-6)
    model.train()  # dropout between backbone and head would show
    for hidden in (random * (target / std) for target in (1, 100)):
        replaced: list[nn.Module] = []

        def replace(module, _args, output, hidden=hidden, replaced=replaced):
            if hasattr(output, "last_hidden_state"):
                output.last_hidden_state = hidden
                replaced.append(module)

        with ExitStack() as hooks:
            # OPT calls the decoder inside its backbone, not the backbone
            for module in {causal_lm.base_model, causal_lm.get_decoder()} - {None}:
                hooks.enter_context(module.register_forward_hook(replace))
            samples.append((hidden, model(input_ids=tokens, use_cache=False).logits))
        if not replaced:
            return []
    return samples


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the rounding of the dtype."""
    a, b = a.detach(), b.detach()
    tolerance = max(1e-4, 4 * torch.finfo(b.dtype).eps) * float(b.abs().max().clamp_min(1e-6))
    return a.shape == b.shape and bool(((a.float() - b.float()).abs() <= tolerance).all())
