"""Stage 3's loss from hidden states: cross-entropy and a divergence from the teacher, without full logits.

A `Head` says how a model leads from hidden states to logits; `read_head` reads it off a model. The loss takes some
tokens at a time through both heads and turns their logits into loss and gradients at once, so that the largest thing
it holds is the gradient of the student's head. It knows nothing of models, batches or sequences.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from subquad.distill.losses import (
    Divergence,
    LogProbs,
    check_options,
    check_vocabularies,
    divergence_grad,
    divergence_per_token,
)
from subquad.modeling.modeling_subquad import SubquadForCausalLM

CHUNK = 512
"""Tokens whose logits exist at a time: products of matrices with fewer rows are slower (128: by a quarter)."""
_BLOCK_BYTES = 2**24
"""Of these, what is turned into loss and gradients at a time: it stays in the cache, and what it needs beside it is
memory that the process has already (the C library gives pieces over 32 MB back each time)."""


class Head(NamedTuple):
    """logits = scale * (h W^T + b), or, with a softcap c, c tanh(that / c)."""

    weight: Tensor
    """`[vocabulary, D]`: the parameter itself."""
    bias: Tensor | None = None
    """`[vocabulary]`"""
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., D]` to `[..., vocabulary]`."""
        logits = F.linear(hidden, self.weight, self.bias) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


# ---------------------------------------------------------------------- reading a head

_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Names under which configurations keep a constant factor of the logits, or what they are divided by."""
_SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
_ROWS, _TOKENS = 2, 8


def read_head(model: PreTrainedModel) -> Head | None:
    """How `model` leads from the last hidden state of its backbone (`model.base_model`, or `student.backbone`) to
    logits, or None where that is not a `Head`: then only its logits will do.

    The candidates come from the output embeddings and the names of the configuration. What decides is the model: its
    forward is run with other hidden states, of several sizes, in the place of those of its backbone, and must give the
    candidate's logits; and its logits may depend on no parameters behind the backbone but those of the head, not even
    on ones that make no difference yet (a low-rank update of the head, a scale that is learned).
    """
    causal: PreTrainedModel = model.base if isinstance(model, SubquadForCausalLM) else model
    output = model.get_output_embeddings()
    weight: Any = getattr(output, "weight", None)
    bias: Tensor | None = getattr(output, "bias", None)
    # not a quantized, sharded or offloaded one
    if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 2 or weight.is_meta:
        return None
    if not weight.is_floating_point() or causal.base_model is causal:
        return None
    with _undisturbed(model):
        # the first ones are often special
        tokens = (3 + torch.arange(_ROWS * _TOKENS, device=weight.device)).view(_ROWS, _TOKENS) % len(weight)
        if not _backbone_gives_what_the_head_gets(model, causal, tokens):
            return None
        probes = _probes(weight)
        found = [x for h in probes if (x := _logits_from(model, causal, tokens, h)) is not None]
        for head in _candidates(weight, bias, causal.config.get_text_config()):
            if len(found) == len(probes) and all(_close(head.logits(h), x) for h, x in zip(probes, found, strict=True)):
                return head if _depends_on_nothing_else(found[0], head, causal) else None
    return None


def _candidates(weight: Tensor, bias: Tensor | None, config: Any) -> Iterator[Head]:
    named = [getattr(config, name, None) for name in _SCALES]
    factors = [float(x) for x in named if isinstance(x, int | float) and x]
    caps = [getattr(config, name, None) for name in _SOFTCAPS]
    for cap in [*(float(x) for x in caps if x), None]:
        for factor in factors:
            yield Head(weight, bias, factor, cap)
            yield Head(weight, bias, 1 / factor, cap)
        yield Head(weight, bias, 1.0, cap)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Leaves random numbers, the modes of modules and what may learn as they were; all parameters may, meanwhile."""
    modes = [(module, module.training) for module in model.modules()]
    learning = [(p, p.requires_grad) for p in model.parameters() if p.is_floating_point()]
    try:
        with torch.random.fork_rng(), torch.enable_grad():
            for p, _ in learning:
                p.requires_grad_(True)
            yield
    finally:
        for module, training in modes:
            module.training = training
        for p, learns in learning:
            p.requires_grad_(learns)


def _close(a: Tensor, b: Tensor) -> bool:
    """Up to the rounding of the dtype."""
    a, b = a.detach(), b.detach()
    tolerance = max(1e-4, 4 * torch.finfo(b.dtype).eps) * float(b.abs().max().clamp_min(1e-6))
    return a.shape == b.shape and bool(((a.float() - b.float()).abs() <= tolerance).all())


def _hidden_of(output: Any) -> Tensor | None:
    found = getattr(output, "last_hidden_state", output[0] if isinstance(output, tuple) else None)
    return found if isinstance(found, Tensor) else None


def _backbone_gives_what_the_head_gets(model: PreTrainedModel, causal: PreTrainedModel, tokens: Tensor) -> bool:
    """Whether the logits change as they should when the backbone's own states are put in the place of themselves."""
    model.eval()
    with torch.no_grad():
        hidden = _hidden_of(causal.base_model(input_ids=tokens, use_cache=False))
        if isinstance(model, SubquadForCausalLM):
            hidden = model.last_hidden_state(tokens)
        if hidden is None or hidden.shape[:-1] != tokens.shape or hidden.shape[-1] != _width(model):
            return False
        expected = model(input_ids=tokens, use_cache=False).logits
        logits = _logits_from(model, causal, tokens, hidden)
        return logits is not None and _close(logits, expected)


def _width(model: PreTrainedModel) -> int:
    return model.get_output_embeddings().weight.shape[1]  # type: ignore[union-attr, index, return-value]


def _probes(weight: Tensor) -> list[Tensor]:
    """Random hidden states: logits of the size of 1, and of 100, where any softcap shows."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_ROWS, _TOKENS, weight.shape[1], generator=generator).to(weight)
    size = F.linear(hidden, weight.detach()).std().clamp_min(1e-6)
    return [hidden * (wanted / size) for wanted in (1, 100)]


def _logits_from(model: PreTrainedModel, causal: PreTrainedModel, tokens: Tensor, hidden: Tensor) -> Tensor | None:
    """The model's logits if its backbone had given `hidden`; None where it has no place to put it. In training mode,
    where hidden states are dropped at random if they ever are on the way to the head."""
    put = False

    def replace(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal put
        if _hidden_of(output) is None:
            return output
        put = True
        if isinstance(output, tuple):
            return hidden, *output[1:]
        output.last_hidden_state = hidden
        return output

    # some (OPT) call the decoder inside of the backbone, past the backbone
    places = {id(module): module for module in (causal.base_model, causal.get_decoder()) if module is not None}
    hooks = [module.register_forward_hook(replace) for module in places.values()]
    try:
        model.train()
        logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return logits if put else None


def _depends_on_nothing_else(logits: Tensor, head: Head, causal: PreTrainedModel) -> bool:
    own = {id(head.weight), id(head.bias)}
    others = [p for p in causal.parameters() if p.requires_grad and id(p) not in own]
    if not others:
        return True
    gradients = torch.autograd.grad(logits.sum(), others, allow_unused=True)
    return all(gradient is None for gradient in gradients)


# ---------------------------------------------------------------------- the loss


class _Objective(NamedTuple):
    ce_weight: float
    kl_weight: float
    temperature: float
    divergence: Divergence
    beta: float


def fused_distillation_loss(
    student_hidden: Tensor,
    teacher_hidden: Tensor | None,
    labels: Tensor,
    student_head: Head,
    teacher_head: Head | None,
    *,
    ce_weight: float = 1.0,
    kl_weight: float = 1.0,
    temperature: float = 1.0,
    divergence: Divergence = "forward",
    beta: float = 0.5,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor, Tensor]:
    """`losses.distillation_loss` of the logits that two heads make of hidden states, which it never holds.

    student_hidden: `[N, D]`; teacher_hidden: `[N, D of the teacher]`, None where `kl_weight` is 0.
    labels: `[N]`, what each position predicts (so shifted already); -100 is ignored, and costs nothing.
    divergence, beta, temperature: as in `losses.py`. chunk: tokens at a time.

    Returns the weighted sum, and detached the cross-entropy and the divergence (0 where `kl_weight` is 0), float32 (or
    float64 of float64): means per token that counts, 0 where none does. Gradients reach the student's hidden states
    and its head, where they are wanted; they are known when this returns, backward only scales them. Products of
    matrices are in the dtype of the head, or of autocast; all else, and the sums over chunks, in float32.

    Raises:
        ValueError: as `distillation_loss`.
        RuntimeError: in backward, with `create_graph`, and when it is run a second time (`retain_graph`): the first
            gives the gradients away rather than a copy.
    """
    check_options(divergence, beta, temperature)
    if kl_weight == 0:
        teacher_hidden = teacher_head = None
    elif teacher_hidden is None or teacher_head is None:
        raise ValueError("teacher_hidden, teacher_head: got None with a kl_weight, expected the teacher's")
    else:
        check_vocabularies(len(student_head.weight), len(teacher_head.weight))
    counted = (labels != -100).nonzero().squeeze(1)
    objective = _Objective(ce_weight, kl_weight, temperature, divergence, beta)
    hidden = student_hidden.index_select(0, counted)
    given = [x for x in (hidden, student_head.weight, student_head.bias) if x is not None]
    # autograd does not say inside of a function whether it was asked for anything
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    if teacher_hidden is not None:
        teacher_hidden = teacher_hidden.detach().index_select(0, counted)
    return _FusedLoss.apply(
        hidden,
        student_head.weight,
        student_head.bias,
        teacher_hidden,
        labels.index_select(0, counted),
        student_head,
        teacher_head,
        objective,
        chunk,
        wanted,
    )


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in one pass over the tokens, all of which count."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher_hidden: Tensor | None,
        labels: Tensor,
        student_head: Head,
        teacher_head: Head | None,
        objective: _Objective,
        chunk: int,
        wanted: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = _Projection(hidden, student_head._replace(weight=weight, bias=bias), chunk)
        teacher = None
        if teacher_hidden is not None and teacher_head is not None:
            teacher = _Projection(teacher_hidden, teacher_head, chunk)
        gradients = _Gradients(student, [wanted and needed for needed in ctx.needs_input_grad[:3]])
        ce = kl = torch.zeros((), dtype=student.logits.dtype, device=hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            for part in _spans(len(labels), chunk):
                x, a, own = student(part), None if teacher is None else teacher(part), labels[part]
                for block in _spans(len(x), max(1, _BLOCK_BYTES // x[:1].nbytes)):
                    terms = _terms_(x[block], None if a is None else a[block], own[block], student_head, objective)
                    ce, kl = ce + terms[0], kl + terms[1]
                gradients.add(part, x)
        ctx.count = max(len(labels), 1)
        ctx.gradients = gradients.take(hidden, weight, bias)
        ce, kl = ce / ctx.count, kl / ctx.count
        ctx.mark_non_differentiable(ce, kl)
        return objective.ce_weight * ce + objective.kl_weight * kl, ce, kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # else the gradients would pass for constants
            raise RuntimeError("the fused loss has no second derivative (create_graph=True); take distillation_loss")
        if ctx.gradients is None:
            raise RuntimeError("the fused loss was differentiated before and gave its gradients away; compute it anew")
        # whoever gets them (as a parameter's `grad`) may keep them without a copy
        gradients, ctx.gradients = ctx.gradients, None
        scale = grad / ctx.count
        return *(None if g is None else g.mul_(scale.to(g.dtype)) for g in gradients), *[None] * 7


class _Projection:
    """Logits of some tokens at a time, in one buffer, in float32 or better."""

    def __init__(self, hidden: Tensor, head: Head, chunk: int):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
        self.hidden, self.head = hidden.to(dtype), head
        self.weight = head.weight.detach().to(dtype)
        shape = min(chunk, len(hidden)), len(self.weight)
        self.logits = hidden.new_empty(shape, dtype=torch.promote_types(dtype, torch.float32))

    def __call__(self, part: slice) -> Tensor:
        x = self.logits[: part.stop - part.start]
        if x.dtype == self.weight.dtype:
            torch.mm(self.hidden[part], self.weight.T, out=x)
        else:
            x.copy_(self.hidden[part] @ self.weight.T)
        if self.head.bias is not None:
            x += self.head.bias
        if self.head.scale != 1:
            x *= self.head.scale
        if self.head.softcap is not None:
            x.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return x


class _Gradients:
    """Sums over chunks of the gradients of hidden states, weight and bias, of which some are wanted."""

    def __init__(self, student: _Projection, wanted: list[bool]):
        self.student = student
        like, bias = student.logits, student.head.bias
        shapes = student.hidden.shape, student.weight.shape, None if bias is None else bias.shape
        self.hidden, self.weight, self.bias = (
            like.new_zeros(shape) if shape is not None and want else None
            for shape, want in zip(shapes, wanted, strict=True)
        )

    def add(self, part: slice, slope: Tensor) -> None:
        """slope: gradient of h W^T + b, `[tokens, vocabulary]`."""
        if self.bias is not None:
            self.bias += slope.sum(0)
        h, W = self.student.hidden[part], self.student.weight
        narrow = slope.to(W.dtype)
        if self.hidden is not None:
            self.hidden[part] = narrow @ W
        if self.weight is None:
            return
        if narrow.dtype == self.weight.dtype:
            self.weight.addmm_(narrow.T, h)
        else:
            self.weight += narrow.T @ h

    def take(self, *like: Tensor | None) -> list[Tensor | None]:
        """The three, each in the dtype of what it is a gradient of."""
        found = self.hidden, self.weight, self.bias
        return [g if g is None or x is None else g.to(x.dtype) for g, x in zip(found, like, strict=True)]


def _spans(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _terms_(
    x: Tensor, teacher: Tensor | None, labels: Tensor, head: Head, objective: _Objective
) -> tuple[Tensor, Tensor]:
    """Sums over tokens of cross-entropy and divergence. Turns `x`, the student's logits, `[tokens, vocabulary]`, into
    the gradient of their weighted sum with respect to h W^T + b; `teacher`, its logits, is used up."""
    ce_weight, kl_weight, temperature, divergence, beta = objective
    own = labels.unsqueeze(1)
    capped = None if head.softcap is None else x / head.softcap
    log_q = torch.log_softmax(x, -1, out=x)
    ce = -log_q.gather(1, own).sum()
    kl, slope, q = torch.zeros_like(ce), None, None
    if teacher is not None:
        log_p = torch.log_softmax(teacher.div_(temperature) if temperature != 1 else teacher, -1, out=teacher)
        pair = LogProbs.of(log_p, log_q if temperature == 1 else torch.log_softmax(log_q / temperature, -1))
        kl = divergence_per_token(pair, divergence, beta).sum() * temperature**2
        slope = divergence_grad(pair, divergence, beta)
        q = pair.q if temperature == 1 else None
    torch.mul(x.exp_() if q is None else q, ce_weight * head.scale, out=x)
    x.scatter_add_(1, own, torch.full_like(own, -ce_weight * head.scale, dtype=x.dtype))
    if slope is not None:
        # the logits are divided by the temperature, the divergence multiplied by its square
        x.add_(slope, alpha=kl_weight * temperature * head.scale)
    if capped is not None:
        x.mul_(capped.square_().neg_().add_(1))
    return ce, kl
