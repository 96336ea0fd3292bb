"""The Triton kernels of flash-linear-attention (`fla`, extra `subquad[gpu]`) as a backend of `chunk` and `step`.

They are used for CUDA tensors if the package is installed. The argument `backend="torch"` or `"fla"`, or else the
environment variable `SUBQUAD_BACKEND`, overrides that. What `fla` does not support is computed by PyTorch, with one log
line for each reason. Layouts and states are the same: [B, T, H, K], [N, H, K, V], one state for each document.
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

from subquad.ops.checks import any_requires_grad

BACKENDS = ("auto", "torch", "fla")
BACKEND_VARIABLE = "SUBQUAD_BACKEND"
MAX_HEAD_SIZE = 256  # of fla's chunk kernels

logger = logging.getLogger("subquad.ops")


def use_fla(backend: str | None, q: Tensor) -> bool:
    """Whether `fla` should compute a call: by the argument, else the environment variable, else the device."""
    name, value = "backend", backend
    if backend is None:
        name, value = BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE, "auto")
    if value not in BACKENDS:
        raise ValueError(f'{name}: got {value!r}, expected "auto", "torch" or "fla"')
    if value == "fla" and not installed():
        raise ValueError(
            f'{name}: got "fla", which needs flash-linear-attention and Triton: pip install "subquad[gpu]"'
        )
    return value == "fla" or (value == "auto" and q.device.type == "cuda" and installed())


def installed() -> bool:
    """Whether `fla` and Triton can be imported; `sys.modules["fla"] = None` hides them."""
    return all(_found(name) for name in ("fla", "triton"))


def _found(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is not None
    return importlib.util.find_spec(name) is not None


def unsupported_reason(op: str, q: Tensor, v: Tensor, beta: Tensor | None, gradients: bool) -> str | None:
    """Why `fla` cannot compute this call, or None."""
    if q.dtype == torch.float64:
        return "fla does not compute in float64"
    if q.shape[1] == 0:
        return "fla does not support empty sequences"
    if op == "chunk" and max(q.shape[-1], v.shape[-1]) > MAX_HEAD_SIZE:
        return f"fla's chunk kernels support heads of at most {MAX_HEAD_SIZE}"
    if op == "step" and beta is not None and gradients:
        return "fla's token-by-token delta-rule kernels have no backward pass"
    return None


@functools.lru_cache
def warn_once(op: str, reason: str) -> None:
    logger.warning("ops.%s: computed by PyTorch instead of fla: %s", op, reason)


def run_kernel(
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
    """Computes `op`, "chunk" or "step", with fla's kernel; logs the reason and returns None if it is not supported."""
    gradients = any_requires_grad(q, k, v, log_decay, beta, initial_state)
    if (reason := unsupported_reason(op, q, v, beta, gradients)) is not None:
        warn_once(op, reason)
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
        arguments["cu_seqlens"] = cu_seqlens.to(q.device, torch.long)
    prefix = "chunk" if op == "chunk" else "fused_recurrent"
    kernel = getattr(importlib.import_module(f"fla.ops.{family}"), f"{prefix}_{family}")
    o, state = kernel(q.contiguous(), k.contiguous(), v.contiguous(), **arguments)
    return o.to(q.dtype), state


def _kernel(log_decay: Tensor | None, beta: Tensor | None, op: str) -> tuple[str, str]:
    """The family of kernels in `fla`, and its name of the decay. The chunk kernel of the plain delta rule refuses
    float32; that of the gated delta rule with a decay of zero accepts it."""
    per_channel = log_decay is not None and log_decay.dim() == 4
    if beta is None:
        if per_channel:
            return "gla", "g" if op == "chunk" else "gk"
        return "simple_gla", "g"
    if per_channel:
        return "kda", "g"
    return ("delta_rule", "g") if log_decay is None and op == "step" else ("gated_delta_rule", "g")
