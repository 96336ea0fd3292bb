"""Linear attention (arXiv 2006.16236, equations 9 to 12): a feature map phi replaces the softmax kernel.

    o_t = phi(q_t)^T S_t / (phi(q_t) . z_t + eps)      S_t = S_{t-1} + phi(k_t) v_t^T,  z_t = z_{t-1} + phi(k_t)

Per state: S [K, V], q, k and z [K], v [V]. There is no decay. By default phi is SiLU, and an RMS norm of
each head's output replaces the normalizer (arXiv 2210.10340). The paper's form is `qk_activation="elu1",
normalizer=True, output_norm=False`. The rotary embedding, if kept, precedes phi.
"""

from subquad import ops
from subquad.mixers.base import Mixer
from subquad.mixers.options import LinearAttentionOptions


class LinearAttention(Mixer):
    name = "linear_attention"
    Options = LinearAttentionOptions
    options: LinearAttentionOptions

    def build_gates(self) -> None:
        if self.options.normalizer:
            self.normalized_ops = (ops.normalized, ops.normalized_matrix)
