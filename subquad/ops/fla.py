"""The kernels of flash-linear-attention (`fla`, extra `subquad[gpu]`) behind the signatures of `chunk` and `step`.

They take over on CUDA where the package is installed; `backend="torch"` or `"fla"` or the environment variable
`SUBQUAD_BACKEND` decides otherwise (the argument wins). What `fla` lacks is computed by ours, with one log line for
each reason. Layout and states are the same: [B, T, H, K], [N, H, K, V], one state a document.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import sys

import torch
from torch import Tensor

BACKENDS = ("auto", "torch", "fla")
VARIABLE = "SUBQUAD_BACKEND"
LARGEST_KEY = 256  # of fla's chunk kernels

logger = logging.getLogger("subquad.ops")


def wanted(backend: str | None, q: Tensor) -> bool:
    """Whether `fla` should compute this call, by argument, environment variable or device, in this order."""
    name, choice = ("backend", backend) if backend is not None else (VARIABLE, os.environ.get(VARIABLE, "auto"))
    if choice not in BACKENDS:
        raise ValueError(f'{name}: got {choice!r}, expected "auto", "torch" or "fla"')
    if choice == "fla" and not installed():
        raise ValueError(
            f'{name}: got "fla", which needs flash-linear-attention and Triton: pip install "subquad[gpu]"'
        )
    return choice == "fla" or (choice == "auto" and q.device.type == "cuda" and installed())


def installed() -> bool:
    """Whether `fla` and Triton can be imported; `sys.modules["fla"] = None` hides them."""
    return all(_found(name) for name in ("fla", "triton"))


def _found(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def lacks(op: str, q: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, gradients: bool) -> str | None:
    """Why `fla` cannot compute this call, or None."""
    if q.dtype == torch.float64:
        return "fla computes in float32 at most"
    if q.shape[1] == 0:
        return "fla has no empty sequences"
    if op == "chunk" and max(q.shape[-1], v.shape[-1]) > LARGEST_KEY:
        return f"fla's chunk kernels end at heads of {LARGEST_KEY}"
    if op == "step" and beta is not None and gradients:
        return "fla's token-by-token delta kernels have no backward pass"
    return None


@functools.lru_cache
def _say_once(op: str, reason: str) -> None:
    logger.warning("ops.%s: computed by PyTorch instead of fla: %s", op, reason)


def run(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    initial_state: Tensor | None,
    scale: float,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor] | None:
    """`op` "chunk" or "step" by the kernel of its kind; None, and a log line, where there is none."""
    tensors = (q, k, v, log_decay, beta, initial_state)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if (reason := lacks(op, q, v, log_decay, beta, gradients)) is not None:
        _say_once(op, reason)
        return None
    family, decay_name = _kernel(log_decay, beta, op)
    arguments: dict = {"scale": scale, "initial_state": initial_state, "output_final_state": True}
    if log_decay is not None:
        B, T, _, _ = q.shape
        per_token = log_decay.expand(B, T, -1) if log_decay.dim() == 1 else log_decay
        arguments[decay_name] = per_token.float().contiguous()
    elif beta is not None and op == "chunk":
        arguments["g"] = q.new_zeros(q.shape[:3], dtype=torch.float32)
    if beta is not None:
        arguments["beta"] = beta
    if cu_seqlens is not None:
        arguments["cu_seqlens"] = cu_seqlens.long()
    prefix = "chunk" if op == "chunk" else "fused_recurrent"
    kernel = getattr(importlib.import_module(f"fla.ops.{family}"), f"{prefix}_{family}")
    o, state = kernel(q.contiguous(), k.contiguous(), v.contiguous(), **arguments)
    return o.to(q.dtype), state


def _kernel(log_decay: Tensor | None, beta: Tensor | None, op: str) -> tuple[str, str]:
    """`fla`'s family of a kind and how it calls the decay. Its plain delta rule refuses float32 in chunks, the gated
    one with a decay of zero does not."""
    per_channel = log_decay is not None and log_decay.dim() == 4
    if beta is None:
        if per_channel:
            return "gla", "g" if op == "chunk" else "gk"
        return "simple_gla", "g"
    if per_channel:
        return "kda", "g"
    return ("delta_rule", "g") if log_decay is None and op == "step" else ("gated_delta_rule", "g")
