"""Linear attention (arXiv 2006.16236, equations 9 to 12): a feature map phi replaces the softmax kernel.

    o_t = phi(q_t)^T S_t / (phi(q_t) . z_t + eps)      S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)

Per head: S [K, V], q, k and z [K], v [V]. There is no decay. By default phi is SiLU, and an RMS norm of
each head's output replaces the normalizer (arXiv 2210.10340). The paper's form is `qk_activation="elu1",
normalizer=True, output_norm=False`. The rotary embedding, if kept, precedes phi.
"""

from typing import Any

from torch import Tensor

from subquad import ops
from subquad.mixers.base import Mixer, State
from subquad.mixers.options import LinearAttentionOptions


class LinearAttention(Mixer):
    name = "linear_attention"
    Options = LinearAttentionOptions
    options: LinearAttentionOptions

    def mixing_matrix(self, inputs: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        if not self.options.normalizer:
            return super().mixing_matrix(inputs, rows)
        return ops.normalized_matrix(inputs["q"], inputs["k"], rows=rows)

    def run_op(
        self, inputs: dict[str, Any], state: State | None = None, cu_seqlens: Tensor | None = None
    ) -> tuple[Tensor, State]:
        if not self.options.normalizer:
            return super().run_op(inputs, state, cu_seqlens)
        form = "step" if inputs["q"].shape[1] == 1 and cu_seqlens is None else "chunk"
        return ops.normalized(**inputs, initial_state=state or None, form=form, cu_seqlens=cu_seqlens)  # type: ignore[arg-type]
