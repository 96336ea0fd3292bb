"""The mathematics of every mixer, as pure functions on tensors; knows nothing of models, modules or configs.

Layout [batch, time, heads, dim]; decays are always carried as logs. `step` is the definition, `chunk` trains and
prefills, `matrix` is the dense mixing matrix; `normalized` and `mlstm` add a normaliser to the same recurrence.
"""

from subquad.ops.chunk import chunk
from subquad.ops.conv import short_conv
from subquad.ops.matrix import matrix
from subquad.ops.mlstm import mlstm, mlstm_matrix
from subquad.ops.normalized import normalized, normalized_matrix
from subquad.ops.recurrence import step

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
