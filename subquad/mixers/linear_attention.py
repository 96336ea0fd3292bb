"""Linear attention (arXiv 2006.16236, equations 9 to 12): a feature map in place of the softmax's kernel.

    o_t = phi(q_t)^T S_t / (phi(q_t) . z_t + eps)      S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)

No decay: a token is never forgotten, only outnumbered. By default phi is SiLU and a head norm stands in place of the
normaliser (as in arXiv 2210.10340), which keeps most of a copied teacher (docs/mixers.md). The paper's own form is
`qk_activation="elu1", normalizer=True, output_norm=False`. Rotary, if kept, goes before phi.
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

    def mixing_matrix(self, core: dict[str, Tensor], rows: slice | None = None) -> Tensor:
        if not self.options.normalizer:
            return super().mixing_matrix(core, rows)
        return ops.normalized_matrix(core["q"], core["k"], rows=rows)

    def run_op(self, core: dict[str, Any], state: State | None, cu_seqlens: Tensor | None) -> tuple[Tensor, State]:
        if not self.options.normalizer:
            return super().run_op(core, state, cu_seqlens)
        form = "step" if core["q"].shape[1] == 1 and cu_seqlens is None else "chunk"
        return ops.normalized(**core, initial_state=state or None, form=form, cu_seqlens=cu_seqlens)  # type: ignore[arg-type]
