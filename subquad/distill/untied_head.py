"""A head with a weight of its own for one stage, of a student whose head is tied to its embeddings."""

from typing import Any, cast

import torch.nn as nn

from subquad.modeling.modeling_subquad import SubquadForCausalLM


class UntiedHead:
    """Gives the head a copy of the embeddings; without effect where they are not tied.

    The matrix of a tied student has two gradients, as embeddings and as head. Untied, each of them moves a copy with
    its own optimizer state and parameter group. `tie` keeps the embeddings and drops the head's copy.
    """

    def __init__(self, student: SubquadForCausalLM):
        self.embeddings, self.head = (
            cast(Any, student.get_input_embeddings()),
            cast(Any, student.get_output_embeddings()),
        )
        weight = getattr(self.embeddings, "weight", None)
        self.was_tied = weight is not None and getattr(self.head, "weight", None) is weight
        if self.was_tied:
            self.head.weight = nn.Parameter(self.embeddings.weight.detach().clone())

    def tie(self) -> None:
        """Ties the head to the embeddings again."""
        if self.was_tied:
            self.head.weight = self.embeddings.weight
