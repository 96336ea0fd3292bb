"""The operators of all mixers, as pure functions on tensors in the layout [batch, time, heads, dim].

`step` defines the recurrence and decodes, `chunk` trains and prefills, `matrix` is the dense mixing matrix.
`normalized` and `mlstm` add a normalizer, `short_conv` is a causal depthwise convolution. Decays are passed as logs.
"""

from subquad.ops.conv import short_conv
from subquad.ops.matrix import matrix
from subquad.ops.normalizers import mlstm, mlstm_matrix, normalized, normalized_matrix
from subquad.ops.recurrence import chunk, step

__all__ = [
    "chunk",
    "matrix",
    "mlstm",
    "mlstm_matrix",
    "normalized",
    "normalized_matrix",
    "short_conv",
    "step",
]
