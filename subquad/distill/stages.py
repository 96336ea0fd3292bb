"""The three stages: what each trains, what it asks of the teacher, and its loss.

An objective is called inside the student's `forward` (`student(objective=stage, **stage.targets(batch))`), so that
data-parallel wrappers see its gradients. The teacher stays outside the student. A batch is what `subquad.data` gives:
`input_ids: [B, T]`, `position_ids: [B, T]` where documents are kept apart, `labels: [B, T]` where some tokens do not
count.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from subquad.config import EndToEnd, Hidden, Matrix
from subquad.data.packing import next_labels
from subquad.distill.fused_loss import Head, fused_distillation_loss, read_head
from subquad.distill.layerwise import layerwise, matrix_distance, output_distance
from subquad.distill.losses import distillation_loss
from subquad.modeling.attention.activations import LayerActivations, attention_modules, collect_activations, layer_path
from subquad.modeling.attention.discovery import AttentionInfo, discover_attention
from subquad.modeling.attention.scores import attention_probabilities, replace_mask, slice_arguments
from subquad.modeling.modeling_subquad import SubquadForCausalLM

Batch = dict[str, Tensor]


@dataclass
class StageOutput(ModelOutput):
    """The loss of a batch, a mean, and where layers learn alone that of each, `[layers]`, detached."""

    loss: Tensor | None = None
    layers: Tensor | None = None


class Objective:
    """A stage. `name` is its key in the recipe."""

    name: str

    def trained(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        """The parameters that learn in this stage."""
        raise NotImplementedError

    def targets(self, batch: Batch) -> dict[str, Any]:
        """What goes to the student's forward: `input_ids`, and what the teacher says of them."""
        raise NotImplementedError

    def count(self, batch: Batch) -> Tensor:
        """Over how many tokens the loss of a batch is a mean."""
        return torch.tensor(batch["input_ids"].numel())

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        raise NotImplementedError


class LayerwiseDistillation(Objective):
    """Stages 1 and 2: every layer learns alone, from the teacher's input to that layer."""

    def __init__(self, teacher: PreTrainedModel):
        self.teacher = teacher
        self.attention_layers: list[AttentionInfo] = discover_attention(teacher)
        self.hooked_modules = attention_modules(self.attention_layers)

    def targets(self, batch: Batch) -> dict[str, Any]:
        input_ids, documents = batch["input_ids"], document_ids(batch)
        positions = None if documents is None else batch["position_ids"]
        recordings = collect_activations(self.teacher, self.hooked_modules, input_ids, positions)
        return {"input_ids": input_ids, "recordings": recordings, "documents": documents}

    def trained(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return [p for group in self.groups(student) for p in group]

    def groups(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        """What learns in each layer."""
        raise NotImplementedError

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, recording: LayerActivations, documents: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        recordings, documents = targets["recordings"], targets["documents"]
        losses = [lambda i=i, r=r: self.layer_loss(student, i, r, documents) for i, r in enumerate(recordings)]
        return StageOutput(*layerwise(losses, self.groups(student)))


class MatrixMixing(LayerwiseDistillation):
    """Stage 1 (MOHAWK, arXiv 2408.10189, section 3.1): each layer's mixing matrix towards the teacher's attention."""

    name = "matrix"

    def __init__(self, teacher: PreTrainedModel, stage: Matrix):
        super().__init__(teacher)
        self.rows = stage.row_chunk_size
        self.hooked_modules = [(module, None) for module, _ in self.hooked_modules]

    def groups(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [block.matrix_parameters() for block in student.mixer_layers]

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, recording: LayerActivations, documents: Tensor | None
    ) -> Tensor:
        B, T, _ = recording.hidden_states.shape
        total = torch.zeros((), device=recording.hidden_states.device)
        for row, tokens in document_slices(documents, B, T):
            args, kwargs = slice_arguments(recording.args, recording.kwargs, tokens, row)
            size = (tokens.stop - tokens.start) * (row.stop - row.start)
            total = total + size * self.distance(student, index, args, kwargs, tokens.stop - tokens.start)
        return total / (B * T)

    def distance(
        self, student: SubquadForCausalLM, index: int, args: tuple, kwargs: dict[str, Any], length: int
    ) -> Tensor:
        block, site = student.mixer_layers[index], self.attention_layers[index]

        @torch.no_grad()
        def target(rows: slice) -> Tensor:
            return attention_probabilities(site.module, site.spec.window, 0, args, kwargs, rows)

        matrix = block.matrix_rows(*args, **kwargs)
        return matrix_distance(matrix, target, length, block.scale_invariant, self.rows)


class HiddenAlignment(LayerwiseDistillation):
    """Stage 2 (MOHAWK, section 3.2): each layer's output towards the teacher's: the mixer's towards the attention's, or
    that of the whole layer.

    `powers` are the mean squares of the teacher's outputs, one a layer, measured once on `calibration: [B, T]`: the
    unit of each layer's loss.
    """

    name = "hidden"

    def __init__(self, teacher: PreTrainedModel, stage: Hidden, calibration: Tensor):
        super().__init__(teacher)
        self.paths = (
            [layer_path(site.path) for site in self.attention_layers] if stage.target == "decoder_layer" else None
        )
        if self.paths is not None:
            self.hooked_modules = [(teacher.get_submodule(path), None) for path in self.paths]
        recordings = collect_activations(teacher, self.hooked_modules, calibration.to(teacher.device))
        self.target_norms = [r.output.float().square().sum(-1).mean() for r in recordings]

    def modules(self, student: SubquadForCausalLM) -> list[nn.Module]:
        if self.paths is None:
            return list(student.mixer_layers)
        return [student.base.get_submodule(path) for path in self.paths]

    def groups(self, student: SubquadForCausalLM) -> list[list[nn.Parameter]]:
        return [list(module.parameters()) for module in self.modules(student)]

    def layer_loss(
        self, student: SubquadForCausalLM, index: int, recording: LayerActivations, documents: Tensor | None
    ) -> Tensor:
        mask = None if documents is None else documents[:, None, None, :]
        module = self.modules(student)[index]
        args, kwargs = replace_mask(module, recording.args, recording.kwargs, mask)
        given = module(*args, **kwargs)
        output = given[0] if isinstance(given, tuple) else given
        return output_distance(output, recording.output, self.target_norms[index])


class EndToEndDistillation(Objective):
    """Stage 3: the whole student on text, by cross-entropy and a divergence from the teacher's distribution.

    Where both models lead from hidden states to logits in a known way, full logits never exist (see `fused.py`).
    """

    name = "end_to_end"

    def __init__(self, teacher: PreTrainedModel, stage: EndToEnd):
        self.teacher, self.stage = teacher, stage
        self.options: dict[str, Any] = {
            "ce_weight": stage.ce_weight,
            "kl_weight": stage.kl_weight,
            "temperature": stage.temperature,
            "divergence": stage.divergence,
            "beta": stage.jsd_beta,
        }
        self.teacher_head = read_head(teacher)
        self.student_head: tuple[SubquadForCausalLM, Head | None] | None = None

    def head_of(self, student: SubquadForCausalLM) -> Head | None:
        """The student's head, whose kind is read once; its weights are the parameters as they are now (sharding puts
        others in their place)."""
        if self.student_head is None or self.student_head[0] is not student:
            with torch.autocast(student.device.type, enabled=False):
                self.student_head = student, read_head(student)
        head, output = self.student_head[1], student.get_output_embeddings()
        return None if head is None else head._replace(weight=output.weight, bias=getattr(output, "bias", None))  # type: ignore[union-attr,arg-type]

    def trained(self, student: SubquadForCausalLM) -> list[nn.Parameter]:
        return list(student.parameters())

    def count(self, batch: Batch) -> Tensor:
        return (next_labels(batch) != -100).sum()

    @torch.no_grad()
    def targets(self, batch: Batch) -> dict[str, Any]:
        if self.stage.data == "teacher_generated":
            batch = {"input_ids": self.write(batch["input_ids"])}
        input_ids = batch["input_ids"]
        where = {} if document_ids(batch) is None else {"position_ids": batch["position_ids"]}
        # Not by its own name, which the student's forward would take for itself.
        given = {"input_ids": input_ids, "next_labels": next_labels(batch), "positions": where.get("position_ids")}
        if self.stage.kl_weight == 0:
            return given
        if self.teacher_head is None:
            return {**given, "teacher_logits": self.teacher(input_ids=input_ids, use_cache=False, **where).logits}
        hidden = self.teacher.base_model(input_ids=input_ids, use_cache=False, **where).last_hidden_state
        return {**given, "teacher_hidden": hidden}

    def write(self, input_ids: Tensor) -> Tensor:
        """The first tokens of each row, and what the teacher writes behind them, drawn from its distribution."""
        T = input_ids.shape[1]
        prompt = input_ids[:, : max(1, round(self.stage.prompt_fraction * T))]
        more = T - prompt.shape[1]
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        return self.teacher.generate(  # type: ignore[operator]
            prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=more, max_new_tokens=more, **sampling
        )

    def __call__(self, student: SubquadForCausalLM, input_ids: Tensor, **targets: Any) -> StageOutput:
        labels, positions = targets["next_labels"], targets["positions"]
        head, teacher_hidden = self.head_of(student), targets.get("teacher_hidden")
        if head is None or "teacher_logits" in targets:
            logits = student(input_ids=input_ids, position_ids=positions, use_cache=False).logits
            shifted = torch.nn.functional.pad(labels[:, :-1], (1, 0), value=-100)
            loss, _, _ = distillation_loss(logits, self.teacher_logits(targets), shifted, **self.options)
            return StageOutput(loss)
        loss, _, _ = fused_distillation_loss(
            student.last_hidden_state(input_ids, positions).flatten(0, 1),
            None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            labels.flatten(),
            head,
            self.teacher_head,
            **self.options,
        )
        return StageOutput(loss)

    @torch.no_grad()
    def teacher_logits(self, targets: dict[str, Any]) -> Tensor | None:
        """For the plain path; None where the teacher has no say."""
        if "teacher_hidden" not in targets:
            return targets.get("teacher_logits")
        where = {} if targets["positions"] is None else {"position_ids": targets["positions"]}
        return self.teacher(input_ids=targets["input_ids"], use_cache=False, **where).logits


def document_ids(batch: Batch) -> Tensor | None:
    """The number of each token's document in its row, `[B, T]`, from 1; None where every row is of one document."""
    positions = batch.get("position_ids")
    if positions is None:
        return None
    starts = positions[:, 1:] == 0
    if not starts.any():
        return None
    documents = torch.ones_like(positions)
    documents[:, 1:] += starts.cumsum(1)
    return documents


@torch.no_grad()
def respects_document_boundaries(teacher: PreTrainedModel) -> bool:
    """Whether positions that restart keep a teacher's documents apart: what it says of a second document must not
    depend on the first."""
    vocabulary: int = teacher.get_input_embeddings().num_embeddings  # type: ignore[assignment, union-attr]
    tokens = torch.arange(12).to(teacher.device) * 7 % vocabulary
    rows = torch.stack([torch.cat([tokens[:5], tokens[5:]]), torch.cat([tokens[5:10], tokens[5:]])])
    positions = torch.cat([torch.arange(5), torch.arange(7)]).to(rows).expand(2, -1)
    training = teacher.training
    hidden = teacher.eval().base_model(input_ids=rows, position_ids=positions, use_cache=False).last_hidden_state
    teacher.train(training)
    return torch.allclose(hidden[0, 5:], hidden[1, 5:], atol=1e-3 * float(hidden.abs().mean()), rtol=1e-3)


def document_slices(documents: Tensor | None, B: int, T: int) -> list[tuple[slice, slice]]:
    """Rows and tokens of pieces that are one document each: the whole batch, or every document of every row."""
    if documents is None:
        return [(slice(0, B), slice(0, T))]
    found = []
    for b, row in enumerate(documents.tolist()):
        begin = 0
        for t in range(1, T + 1):
            if t == T or row[t] != row[begin]:
                found.append((slice(b, b + 1), slice(begin, t)))
                begin = t
    return found
