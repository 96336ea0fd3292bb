"""The Triton kernels of flash-linear-attention (`fla`, extra `subquad[gpu]`) as a backend of `chunk` and `step`.

They are used for CUDA tensors if the package is installed. The argument `backend="torch"` or `"fla"`, or else the
environment variable `SUBQUAD_BACKEND`, overrides that. What `fla` does not support is computed by PyTorch, with one log
line for each reason. Layouts and states are the same: [B, T, H, K], [N, H, K, V], one state for each document. Several
query heads of one state get a copy of it each in the chunk kernels, and are not supported by those for single tokens.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os

import torch
from torch import Tensor

from subquad.ops.checks import Inputs, any_requires_grad
from subquad.utils import install_command

BACKENDS = ("auto", "torch", "fla")
BACKEND_VARIABLE = "SUBQUAD_BACKEND"
MIN_HEAD_SIZE, MAX_HEAD_SIZE = 16, 256  # of fla's chunk kernels

logger = logging.getLogger("subquad.ops")


def use_fla(backend: str | None, q: Tensor) -> bool:
    """Whether `fla` should compute a call: by the argument, else the environment variable, else the device."""
    name, value = "backend", backend
    if backend is None:
        name, value = BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE, "auto")
    if value not in BACKENDS:
        raise ValueError(f'{name}: got {value!r}, expected "auto", "torch" or "fla"')
    if value == "fla" and not installed():
        raise ValueError(f'{name}: got "fla", which needs flash-linear-attention and Triton: {install_command("gpu")}')
    return value == "fla" or (value == "auto" and q.device.type == "cuda" and installed())


def installed() -> bool:
    """Whether `fla` and Triton can be imported; `sys.modules["fla"] = None` hides them."""
    return all(importlib.util.find_spec(name) is not None for name in ("fla", "triton"))


def unsupported_reason(op: str, q: Tensor, v: Tensor, beta: Tensor | None, gradients: bool) -> str | None:
    """Why `fla` cannot compute this call, or None."""
    if q.dtype == torch.float64:
        return "fla does not compute in float64"
    if q.shape[1] == 0:
        return "fla does not support empty sequences"
    if op == "chunk" and not all(MIN_HEAD_SIZE <= x.shape[-1] <= MAX_HEAD_SIZE for x in (q, v)):
        return f"fla's chunk kernels support heads of {MIN_HEAD_SIZE} to {MAX_HEAD_SIZE}"
    if op == "step" and q.shape[2] != v.shape[2]:
        return "fla's token-by-token kernels have one query head for each state"
    if op == "step" and beta is not None and gradients:
        return "fla's token-by-token delta-rule kernels have no backward pass"
    return None


@functools.lru_cache
def refuses_scalar_decay() -> bool:
    """Whether `fla` refuses the backward pass of a decay per head, which Triton 3.4 to 3.7.0 compiles wrongly for
    Hopper; its own replacement needs tilelang."""
    utils = importlib.import_module("fla.utils")
    wrong = utils.IS_NVIDIA_HOPPER and utils.TRITON_ABOVE_3_4_0 and not utils.TRITON_ABOVE_3_7_1
    return wrong and importlib.util.find_spec("tilelang") is None


@functools.lru_cache
def warn_once(op: str, reason: str) -> None:
    logger.warning("ops.%s: computed by PyTorch instead of fla: %s", op, reason)


def run(
    backend: str | None, op: str, inputs: Inputs, scale: float, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor] | None:
    """Computes `op`, "chunk" or "step", with fla's kernel.

    Returns None if PyTorch should compute it, as in a compiled step, and logs the reason if fla was chosen but does not
    support the call.
    """
    # A compiled step is PyTorch's, which the compiler fuses: fla's kernels and log lines would break its graph.
    if (op == "step" and torch.compiler.is_compiling()) or not use_fla(backend, inputs.q):
        return None
    if (reason := unsupported_reason(op, inputs.q, inputs.v, inputs.beta, any_requires_grad(*inputs))) is not None:
        warn_once(op, reason)
        return None
    return run_kernel(op, inputs, scale, cu_seqlens)


def run_kernel(op: str, inputs: Inputs, scale: float, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    queries, inputs = inputs.queries, inputs.expand()
    q, k, v, log_decay, beta, initial_state, *_ = inputs
    decays = log_decay is not None or beta is not None
    if op == "chunk" and decays and any_requires_grad(*inputs) and refuses_scalar_decay():
        log_decay = _per_channel(log_decay, k)
    family, decay_name = _kernel(log_decay, beta, op)
    arguments: dict = {"scale": scale, "initial_state": initial_state, "output_final_state": True}
    if log_decay is not None:
        per_token = log_decay.expand(*q.shape[:2], -1) if log_decay.dim() == 1 else log_decay
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
    return o.to(q.dtype), state if queries == 1 else state[:, ::queries].contiguous()


def run_short_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor] | None:
    """`short_conv` without an initial state by fla's kernel; None if PyTorch should compute it."""
    if not use_fla(None, x) or x.dtype == torch.float64 or not x.shape[1]:
        return None
    if importlib.util.find_spec("fla.modules.causal_conv1d") is None:  # before fla 0.6
        return None
    kernel = importlib.import_module("fla.modules.causal_conv1d").causal_conv1d
    bounds = None if cu_seqlens is None else cu_seqlens.to(x.device, torch.long)
    options = {"output_final_state": True, "activation": activation, "cu_seqlens": bounds}
    y, state = kernel(x.contiguous(), weight.contiguous(), bias, **options)
    return y, state[..., 1:].mT.contiguous()  # of the last W inputs, [N, D, W]


def _per_channel(log_decay: Tensor | None, k: Tensor) -> Tensor:
    """The same decay in every channel, [B, T, H, K]."""
    if log_decay is None:
        return torch.zeros_like(k, dtype=torch.float32)
    return log_decay if log_decay.dim() == 4 else log_decay.expand(k.shape[:3]).unsqueeze(-1).expand(k.shape)


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
