"""Each stage on a tiny teacher: what it trains, that its loss falls, that the teacher does not change."""

import weakref

import pytest
import torch
import torch.nn as nn
from transformers import LlamaConfig, LlamaForCausalLM

import subquad
from subquad import mixers
from subquad.config import EndToEndStage, HiddenStage, Lora, MatrixStage
from subquad.distill import matrix_mixing
from subquad.distill.end_to_end import EndToEndDistillation
from subquad.distill.hidden_alignment import HiddenAlignment
from subquad.distill.layerwise import LayerwiseDistillation
from subquad.distill.matrix_mixing import MatrixMixing, document_slices, matrix_distance
from subquad.distill.param_groups import add_lora, parameter_roles
from subquad.distill.recipe_stages import STAGE_NAMES
from subquad.distill.teacher_checks import respects_document_boundaries


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def make_objective(stage, teacher, ids):
    if stage == "matrix":
        return MatrixMixing(teacher, MatrixStage(tokens=1, lr=1.0))
    if stage == "hidden":
        return HiddenAlignment(teacher, HiddenStage(tokens=1, lr=1.0), ids)
    return EndToEndDistillation(teacher, EndToEndStage(tokens=1, lr=1.0))


def copied_weights(model):
    return [p.clone() for p in model.state_dict().values()]


NEAR_FAR = [
    ("gla", {"window": 5, "sinks": 2}),
    ("gated_deltanet", {"window": [3, 9], "merge": "add", "state_heads": "key_value"}),
    ("mamba2", {"window": 6, "merge": "denominator", "qk_activation": "hedgehog", "output_norm": False}),
    ("xlstm", {"window": 4, "memory": "all"}),
]
ROLES = {
    ".attention.": "attention_projections",
    ".mixer.": "mixer",
    ".merge.": "mixer",
    "embed_tokens": "embeddings",
    "lm_head": "head",
}
each_student = pytest.mark.parametrize(
    ("mixer", "options"), [*((name, {}) for name in mixers.names()), *NEAR_FAR], ids=str
)


@pytest.mark.parametrize("stage", STAGE_NAMES)
@each_student
def test_stage_lowers_its_loss_and_trains_its_parameters_only(mixer, options, stage, teacher):
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, mixer, copy_qkv=mixer != "softmax", scale_ids=ids, **options)
    student.requires_grad_(True)
    objective = make_objective(stage, teacher, ids)
    before, teacher_before = copied_weights(student), copied_weights(teacher)
    trained = objective.trained_parameters(student)
    trained_ids = {id(p) for p in trained}
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(12):
        loss = student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in student.named_parameters():
            if id(parameter) not in trained_ids:
                assert parameter.grad is None or not parameter.grad.any(), name
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(teacher_before, copied_weights(teacher), strict=True))
    changed = {
        name for (name, new), old in zip(student.state_dict().items(), before, strict=True) if not torch.equal(new, old)
    }
    outside = {name for name in changed if ".self_attn." not in name}
    assert changed.issuperset(name for name in student.state_dict() if name.endswith(("q_map", "k_map")))
    assert changed
    assert bool(outside) == (stage == "end_to_end")
    if stage == "matrix":
        assert not any(part in name for name in changed for part in ("v_proj", "o_proj", "o_norm", "g_proj"))


@each_student
def test_stage_2_has_gradients_for_every_parameter_of_a_mixer(mixer, options, teacher):
    """Weights are perturbed first, since gates that are zero at initialization block gradients."""
    torch.manual_seed(2)
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, mixer, scale_ids=ids, **options).requires_grad_(True)
    objective = HiddenAlignment(teacher, HiddenStage(tokens=1, lr=1.0), ids)
    with torch.no_grad():
        for parameter in objective.trained_parameters(student):
            parameter.add_(0.05 * torch.randn_like(parameter))
    student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss.backward()
    layers = student.mixer_layers
    assert not [n for layer in layers for n, p in layer.named_parameters() if p.grad is None or not p.grad.any()]


def test_roles_and_low_rank_updates_of_attention_beside_a_memory(teacher):
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, "gla", window=4, qk_activation="hedgehog", scale_ids=ids)
    roles = parameter_roles(student)
    for name, parameter in student.named_parameters():
        expected = [role for part, role in ROLES.items() if part in name] or ["backbone"]
        assert [roles[id(parameter)]] == expected, name
    before = student(ids).logits
    lora = add_lora(student, Lora(rank=2, alpha=4), 0)
    updated = {name.split(".lora_")[0] for name, _ in student.named_parameters() if ".lora_" in name}
    assert {name.split(".")[-1] for name in updated} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    lora.merge_and_unload()
    torch.testing.assert_close(student(ids).logits, before)


def test_layerwise_losses_of_a_softmax_copy_are_zero(teacher):
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, "softmax").requires_grad_(True)
    for stage in ("matrix", "hidden"):
        objective = make_objective(stage, teacher, ids)
        assert student(
            objective=objective, **objective.forward_kwargs({"input_ids": ids})
        ).loss.item() == pytest.approx(0, abs=1e-6)


def test_loss_of_stage_2_is_one_for_outputs_of_zero(teacher):
    ids = torch.randint(0, 64, (2, 24))
    student, objective = subquad.linearize(teacher, "gla"), make_objective("hidden", teacher, ids)
    with torch.no_grad():
        for layer in student.mixer_layers:
            layer.mixer.o_proj.weight.zero_()
    out = student(objective=objective, **objective.forward_kwargs({"input_ids": ids}))
    torch.testing.assert_close(out.layer_losses, torch.ones(2))


@each_student
def test_row_chunk_size_of_stage_1_has_no_effect(mixer, options, teacher):
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    options = {} if mixer == "softmax" else {"state_heads": "key_value", **options}
    student = subquad.linearize(teacher, mixer, copy_qkv=mixer != "softmax", scale_ids=ids, **options)
    student.requires_grad_(True)
    results = []
    for row_chunk_size in (1024, 7):
        objective = MatrixMixing(teacher, MatrixStage(tokens=1, lr=1.0, row_chunk_size=row_chunk_size))
        student.zero_grad()
        loss = student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss
        loss.backward()
        results.append((loss.item(), [p.grad.clone() for p in objective.trained_parameters(student)]))
    (loss, grads), (chunked_loss, chunked_grads) = results
    assert chunked_loss == pytest.approx(loss, rel=1e-5)
    for a, b in zip(grads, chunked_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + 1e-4 * a.abs().max().item())


@pytest.mark.parametrize("stage", STAGE_NAMES)
@pytest.mark.parametrize(
    ("mixer", "options"), [*((m, {}) for m in ("gla", "gated_deltanet", "xlstm", "softmax")), *NEAR_FAR], ids=str
)
def test_loss_of_packed_documents_matches_separate_rows(mixer, options, stage, teacher):
    """Two documents in a row, separated by their positions: the loss is the mean over the tokens of both."""
    a, b = torch.randint(3, 64, (1, 9)), torch.randint(3, 64, (1, 15))
    calibration = torch.randint(3, 64, (2, 12))
    student = subquad.linearize(teacher, mixer, copy_qkv=mixer != "softmax", scale_ids=calibration, **options)
    objective = make_objective(stage, teacher, calibration)

    def loss_and_count(ids, lengths):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batch = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
        with torch.no_grad():
            return student(objective=objective, **objective.forward_kwargs(batch)).loss.item(), objective.count_tokens(
                batch
            ).item()

    packed, count = loss_and_count(torch.cat([a, b], dim=1), (9, 15))
    (first, n), (second, m) = loss_and_count(a, (9,)), loss_and_count(b, (15,))
    assert count == n + m
    assert packed == pytest.approx((n * first + m * second) / (n + m), rel=2e-4)


def test_respects_document_boundaries(teacher):
    assert respects_document_boundaries(teacher)
    other = LlamaForCausalLM(teacher.config).eval()
    forward = other.base_model.forward
    other.base_model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    assert not respects_document_boundaries(other)


class DropoutHead(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, self.training))


def test_stage_3_of_a_student_whose_head_cannot_be_read(teacher):
    """The loss on full logits is computed instead, although the teacher's head can be read."""
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, "gla", scale_ids=ids).eval()

    def loss():
        objective = make_objective("end_to_end", teacher, ids)
        value = student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss
        return value, objective.head_of(student)

    expected, head = loss()
    assert head is not None
    other = DropoutHead(32, 64, bias=False).eval()
    other.weight = student.get_output_embeddings().weight
    student.set_output_embeddings(other)
    found, head = loss()
    assert head is None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_loss_of_a_batch_is_the_mean_of_its_rows(teacher):
    ids = torch.randint(0, 64, (4, 24))
    student = subquad.linearize(teacher, "gla").requires_grad_(True)
    for stage in STAGE_NAMES:
        objective = make_objective(stage, teacher, ids)

        def loss(rows, objective=objective):
            return student(objective=objective, **objective.forward_kwargs({"input_ids": rows})).loss.item()

        assert loss(ids) == pytest.approx((loss(ids[:1]) + 3 * loss(ids[1:])) / 4, rel=1e-4)


class PowerOfWeights(LayerwiseDistillation):
    """Layer i has the loss (i + 1) |w|^2 of one weight; another has no effect, and a third is frozen."""

    def layer_parameters(self, student):
        return [
            [layer.mixer.q_proj.weight, layer.mixer.k_proj.weight, layer.mixer.v_proj.weight]
            for layer in student.mixer_layers
        ]

    def layer_loss(self, student, index, activations, targets):
        assert all(ref() is None for ref in self.graphs)
        q, _, v = self.layer_parameters(student)[index]
        hidden = q * 1
        self.graphs.append(weakref.ref(hidden))
        return (index + 1) * hidden.square().sum() + v.sum()


def test_layerwise_loss_is_the_mean_with_its_gradient(teacher):
    """The graph of a layer is freed before the next layer is computed."""
    student = subquad.linearize(teacher, "gla").requires_grad_(True)
    objective = PowerOfWeights(teacher, MatrixStage(tokens=1, lr=1.0))
    objective.graphs = []
    weights = objective.layer_parameters(student)
    for _, _, v in weights:
        v.requires_grad_(False)
    inputs = objective.forward_kwargs({"input_ids": torch.randint(0, 64, (2, 24))})
    out = student(objective=objective, **inputs)
    expected = [(i + 1) * q.square().sum() + v.sum() for i, (q, _, v) in enumerate(weights)]
    torch.testing.assert_close(out.layer_losses, torch.stack(expected).detach())
    assert out.loss.item() == pytest.approx(out.layer_losses.mean().item())
    (3 * out.loss).backward()
    for i, (q, k, v) in enumerate(weights):
        torch.testing.assert_close(q.grad, 3 * (i + 1) * q.detach())  # 2 q of the square, divided by two layers
        assert not k.grad.any()
        assert v.grad is None
    with torch.no_grad():
        assert not student(objective=objective, **inputs).loss.requires_grad


@pytest.mark.parametrize("options", [("matrix", {}), ("hidden", {}), ("hidden", {"target": "decoder_layer"})])
def test_stages_1_and_2_hold_the_activations_of_one_layer(options, teacher):
    """The loss of a layer is computed while the teacher runs; an output that the next layer reads still exists then."""
    stage, target = options
    config = LlamaConfig(**{**teacher.config.to_dict(), "num_hidden_layers": 6})
    deep, ids = LlamaForCausalLM(config).eval(), torch.randint(0, 64, (2, 24))
    student = subquad.linearize(deep, "gla", scale_ids=ids).requires_grad_(True)
    if stage == "matrix":
        objective = MatrixMixing(deep, MatrixStage(tokens=1, lr=1.0))
    else:
        objective = HiddenAlignment(deep, HiddenStage(tokens=1, lr=1.0, **target), ids)
    layer_loss, alive, most = objective.layer_loss, [], []

    def spy(student, index, activations, *more):
        alive.append(weakref.ref(activations.output))
        most.append(sum(ref() is not None for ref in alive))
        return layer_loss(student, index, activations, *more)

    objective.layer_loss = spy
    student(objective=objective, **objective.forward_kwargs({"input_ids": ids})).loss.backward()
    assert len(most) == 6
    assert max(most) <= 2


def test_document_slices():
    doc_ids = torch.tensor([[1, 1, 2, 2, 2], [1, 1, 1, 1, 1], [1, 2, 3, 3, 4]])
    spans = [(0, 0, 2), (0, 2, 5), (1, 0, 5), (2, 0, 1), (2, 1, 2), (2, 2, 4), (2, 4, 5)]
    assert document_slices(doc_ids[:, None, None], 3, 5) == [(slice(b, b + 1), slice(s, e)) for b, s, e in spans]
    assert document_slices(None, 3, 5) == [(slice(0, 3), slice(0, 5))]


def test_documents_are_located_once_a_batch(teacher, monkeypatch):
    calls = []
    monkeypatch.setattr(matrix_mixing, "document_slices", lambda *args: calls.append(0) or document_slices(*args))
    batch = {"input_ids": torch.randint(0, 64, (2, 24)), "position_ids": torch.arange(12).repeat(2, 2)}
    student = subquad.linearize(teacher, "gla", scale_ids=batch["input_ids"])
    objective = make_objective("matrix", teacher, batch["input_ids"])
    student(objective=objective, **objective.forward_kwargs(batch)).loss.backward()
    assert len(calls) == 1


@pytest.fixture
def ending_teacher(teacher):
    """Half of all tokens end the text; what follows an end is token 5."""
    other = LlamaForCausalLM(teacher.config).eval().requires_grad_(False)
    other.generation_config.eos_token_id, other.generation_config.pad_token_id = list(range(32)), 5
    return other


def test_text_that_the_teacher_generates_can_end(ending_teacher):
    ids = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))
    stage = EndToEndStage(tokens=1, lr=1.0, data="teacher_generated", prompt_fraction=0.25)
    objective = EndToEndDistillation(ending_teacher, stage)
    torch.manual_seed(0)
    batch = objective.training_batch({"input_ids": ids})
    found, labels = batch["input_ids"], batch["labels"]
    assert found.shape == ids.shape
    assert torch.equal(found[:, :6], ids[:, :6])  # the prompt may hold ends
    lengths = [next((t + 1 for t in range(6, 24) if row[t] < 32), 24) for row in found]
    assert len(set(lengths)) > 3
    for row, label, length in zip(found, labels, lengths, strict=True):
        assert torch.equal(label[:length], row[:length])
        assert (row[length:] == 5).all()
        assert (label[length:] == -100).all()
    assert objective.count_tokens(batch) == sum(lengths) - 16

    student = subquad.linearize(ending_teacher, "gla", scale_ids=ids)
    losses = []
    for padding in (5, 40):
        text = {**batch, "input_ids": found.where(labels != -100, padding)}
        losses.append(student(objective=objective, **objective.forward_kwargs(text)).loss.item())
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- the distance of two matrices


def rows_of(matrix):
    return lambda rows: matrix[:, :, rows]


def distance(matrix, target, scale_invariant, row_chunk_size=64):
    return matrix_distance(rows_of(matrix), rows_of(target), matrix.shape[-1], scale_invariant, row_chunk_size)


@pytest.mark.parametrize("scale_invariant", [False, True])
def test_matrix_distance_is_the_mean_over_the_batch(scale_invariant):
    A, M = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    halves = [distance(M[i : i + 2], A[i : i + 2], scale_invariant) for i in (0, 2)]
    assert distance(M, A, scale_invariant).item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-6)


@pytest.mark.parametrize("row_chunk_size", [1, 3, 8])
@pytest.mark.parametrize("scale_invariant", [False, True])
def test_row_chunk_size_of_matrix_distance_has_no_effect(row_chunk_size, scale_invariant):
    A, M = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 8, 8, requires_grad=True)
    expected, found = distance(M, A, scale_invariant), distance(M, A, scale_invariant, row_chunk_size)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, M)[0] for x in (found, expected)))


def test_matrix_distance():
    A = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert distance(A, A, False).item() == 0
    assert distance(torch.zeros_like(A), A, False).item() == pytest.approx((1 + 0.5) / 2)
    # scale invariance ignores any positive factor, and -A is no better than zero
    assert distance(7 * A, A, True).item() == pytest.approx(0, abs=1e-6)
    assert distance(-A, A, True).item() == pytest.approx((1 + 0.5) / 2)
    assert distance(torch.zeros_like(A), A, True).item() == pytest.approx((1 + 0.5) / 2)
    assert distance(7 * A, A, False).item() > 1
    # no other scale has a smaller distance
    M = torch.rand_like(A)
    best = distance(M, A, True).item()
    assert all(best <= distance(s * M, A, False).item() + 1e-7 for s in torch.linspace(0, 3, 61))
