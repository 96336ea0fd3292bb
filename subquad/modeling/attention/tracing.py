"""Watches attention at work: what it is given, what reaches softmax, what its parts take and give.

Almost every attention of `transformers` hands its queries, keys and values to a function that can be replaced. A
stand-in for it sees them; where an older family writes softmax(q k^T) v out, a watch over torch's functions does.
What is seen is read in `families.py`; nothing here knows what it means.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subquad.utils import UserError

TRACED = "subquad_watched"
TRACE_BATCH, TRACE_LENGTH = 5, 13
"""Size of the text that is run: primes that are no usual number of heads, so that axes can be told apart."""


@dataclass
class AttentionCall:
    """One attention at work: what it was given, what reached the attention function (`[B, H, T, D]`), what that made
    of it (`[B, T, H, V]`), and what the module's parts took and gave, by name."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    attn_output: Tensor
    mask: Tensor | None = None
    probabilities: Tensor | None = None
    """Where the family computes them itself."""
    attention_kwargs: dict[str, Any] = field(default_factory=dict)
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    submodule_io: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    module_output: Any = None

    @property
    def hidden_states(self) -> Tensor:
        return self.kwargs["hidden_states"] if "hidden_states" in self.kwargs else self.args[0]

    @property
    def window(self) -> int | None:
        """Tokens that a query sees: by the mask, which some families leave to say it alone, or as attention is told."""
        return getattr(self.mask, "subquad_window", (self.attention_kwargs.get("sliding_window"), False))[0]

    @property
    def is_chunked(self) -> bool:
        """Whether what is seen begins anew every `window` tokens."""
        return getattr(self.mask, "subquad_window", (None, False))[1]

    @property
    def position_embeddings(self) -> tuple[Tensor, Tensor] | None:
        return self.kwargs.get("position_embeddings")


_calls: list[AttentionCall] = []


def _traced_attention(module, query, key, value, attention_mask, **options):
    plain = {name: option for name, option in options.items() if name not in ("softcap", "s_aux")}
    mixed = sdpa_attention_forward(module, query, key, value, attention_mask, **plain)[0]
    _calls.append(AttentionCall(module, query, key, value, mixed, attention_mask, attention_kwargs=options))
    return mixed, None


def _traced_mask(*args, **kwargs):
    """The mask, never left out, with what is known of the window that made it: the text is too short to show it."""
    size = kwargs.get("local_size")
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if mask is not None and size is not None:
        # In a window the last token of twice its size sees the second half; in chunks it has just begun the third.
        places = (torch.tensor(n, device=mask.device) for n in (0, 0, 2 * size, size + 1))
        mask.subquad_window = size, size > 1 and not bool(kwargs["mask_function"](*places))  # type: ignore[attr-defined]
    return mask


AttentionInterface.register(TRACED, _traced_attention)
AttentionMaskInterface.register(TRACED, _traced_mask)


@contextmanager
def attention_implementation(model: nn.Module, name: str) -> Iterator[None]:
    """Every attention below `model` goes through the implementation `name` for a while."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(getattr(m, "config", None), "to_dict")}
    before = [(config, config._attn_implementation) for config in configs.values()]  # type: ignore[union-attr]
    try:
        for config, _ in before:
            config._attn_implementation = name  # type: ignore[union-attr]
        yield
    finally:
        for config, chosen in before:
            config._attn_implementation = chosen  # type: ignore[union-attr]


class EagerAttentionTracer(TorchFunctionMode):
    """Sees softmax(q k^T) v where it is written out, or given to torch's own function for it, in whichever module is
    the last of `running`."""

    MATMULS = torch.matmul, torch.bmm, Tensor.matmul, Tensor.__matmul__, Tensor.bmm
    SOFTMAXES = torch.softmax, Tensor.softmax, nn.functional.softmax

    def __init__(self, running: list[nn.Module]):
        super().__init__()
        self.module_stack = running
        self.query_and_key: tuple[Tensor, Tensor] | None = None
        self.probabilities: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.scaled_dot_product_attention:
            q, k, v, mask = (*args, None)[:4]
            mask = (kwargs or {}).get("attn_mask", mask)
            _calls.append(AttentionCall(self.module_stack[-1], q, k, v, out.transpose(1, 2), mask))
        elif func in self.SOFTMAXES:
            self.probabilities = out if self.query_and_key is not None else None
        elif func in self.MATMULS and self.probabilities is not None and same_values(args[0], self.probabilities):
            given = (*self.query_and_key, args[1], out, self.probabilities)  # type: ignore[misc]
            q, k, v, o, p = (x if x.dim() == 4 else x.unflatten(0, (TRACE_BATCH, -1)) for x in given)
            _calls.append(AttentionCall(self.module_stack[-1], q, k, v, o.transpose(1, 2), probabilities=p))
            self.query_and_key = self.probabilities = None
        elif func in self.MATMULS and out.shape[-2:] == (TRACE_LENGTH, TRACE_LENGTH):
            self.query_and_key = args[0], args[1].transpose(-1, -2)
        return out


@torch.no_grad()
def trace_attention(model: PreTrainedModel, input_ids: Tensor) -> list[AttentionCall]:
    """Runs `model` once on `[B, T]` tokens and looks into its attentions. UserError where it fails."""
    given: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}
    made: dict[nn.Module, Any] = {}

    running: list[nn.Module] = []

    def enter(module, args, kwargs):
        given[module] = args, kwargs
        running.append(module)

    def leave(module, args, output):
        made[module] = output
        running.pop()

    hooks: list[Any] = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
    hooks += [module.register_forward_hook(leave) for module in model.modules()]
    _calls.clear()
    try:
        with attention_implementation(model, TRACED):
            model(input_ids=input_ids, use_cache=False)
        if not _calls:
            with attention_implementation(model, "eager"), EagerAttentionTracer(running):
                model(input_ids=input_ids, use_cache=False)
        calls = list(_calls)
    except Exception as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{type(model).__name__} cannot be linearized: it failed while its attention was watched: {why[0]}"
        ) from error
    finally:
        _calls.clear()
        for hook in hooks:
            hook.remove()
    for call in calls:
        (call.args, call.kwargs), call.module_output = given[call.module], made[call.module]
        for name, part in call.module.named_modules():
            if name and part in made:
                args, output = given[part][0], made[part]
                if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                    call.submodule_io[name] = args[0], output
    return calls


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers in the same order, whatever their axes."""
    return a.numel() == b.numel() and torch.equal(a.flatten(), b.flatten())
