"""Each stage on a tiny teacher: what it trains, that it learns, and that the teacher never changes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import subquad
from subquad import mixers
from subquad.config import EndToEnd, Hidden, Matrix
from subquad.distill.stages import EndToEndDistillation, HiddenAlignment, MatrixMixing, respects_document_boundaries

STAGES = ("matrix", "hidden", "end_to_end")


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


def make(stage, teacher, ids):
    if stage == "matrix":
        return MatrixMixing(teacher, Matrix(tokens=1, lr=1.0))
    if stage == "hidden":
        return HiddenAlignment(teacher, Hidden(tokens=1, lr=1.0), ids)
    return EndToEndDistillation(teacher, EndToEnd(tokens=1, lr=1.0))


def checksum(model):
    return [p.clone() for p in model.state_dict().values()]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mixer", mixers.names())
def test_a_stage_lowers_its_loss_and_trains_what_it_says(mixer, stage, teacher):
    torch.manual_seed(1)
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, mixer, copy_qkv=mixer != "softmax", scale_ids=ids).requires_grad_(True)
    objective = make(stage, teacher, ids)
    before, teacher_before = checksum(student), checksum(teacher)
    trained = objective.trained(student)
    trained_ids = {id(p) for p in trained}
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for _ in range(12):
        loss = student(objective=objective, **objective.targets({"input_ids": ids})).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in student.named_parameters():
            if id(parameter) not in trained_ids:
                assert parameter.grad is None or not parameter.grad.any(), name
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(teacher_before, checksum(teacher), strict=True))
    changed = {
        name for (name, new), old in zip(student.state_dict().items(), before, strict=True) if not torch.equal(new, old)
    }
    outside = {name for name in changed if ".self_attn." not in name}
    assert changed
    assert bool(outside) == (stage == "end_to_end")
    if stage == "matrix":
        assert not any(part in name for name in changed for part in ("v_proj", "o_proj", "o_norm", "g_proj"))


@pytest.mark.parametrize("mixer", mixers.names())
def test_every_parameter_of_a_mixer_is_reached_by_stage_2(mixer, teacher):
    """After one step, so that gates which start at zero have moved, a gradient reaches every parameter."""
    torch.manual_seed(2)
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, mixer, scale_ids=ids).requires_grad_(True)
    objective = HiddenAlignment(teacher, Hidden(tokens=1, lr=1.0), ids)
    with torch.no_grad():
        for parameter in objective.trained(student):
            parameter.add_(0.05 * torch.randn_like(parameter))
    student(objective=objective, **objective.targets({"input_ids": ids})).loss.backward()
    silent = [n for b in student.mixer_layers for n, p in b.named_parameters() if p.grad is None or not p.grad.any()]
    assert not silent


def test_the_control_with_copied_weights_has_nothing_to_learn(teacher):
    ids = torch.randint(0, 64, (2, 24))
    student = subquad.linearize(teacher, "softmax").requires_grad_(True)
    for stage in ("matrix", "hidden"):
        objective = make(stage, teacher, ids)
        assert student(objective=objective, **objective.targets({"input_ids": ids})).loss.item() == pytest.approx(
            0, abs=1e-6
        )


@pytest.mark.parametrize("mixer", mixers.names())
def test_stage_1_in_blocks_of_rows_is_the_same(mixer, teacher):
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    student = subquad.linearize(teacher, mixer, copy_qkv=mixer != "softmax", scale_ids=ids).requires_grad_(True)
    found = []
    for rows in (1024, 7):
        objective = MatrixMixing(teacher, Matrix(tokens=1, lr=1.0, row_chunk_size=rows))
        student.zero_grad()
        loss = student(objective=objective, **objective.targets({"input_ids": ids})).loss
        loss.backward()
        found.append((loss.item(), [p.grad.clone() for p in objective.trained(student)]))
    (whole, grads), (blocks, block_grads) = found
    assert blocks == pytest.approx(whole, rel=1e-5)
    for a, b in zip(grads, block_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-6 + 1e-4 * a.abs().max().item())


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mixer", ["gla", "gated_deltanet", "xlstm", "softmax"])
def test_packed_documents_are_learned_as_each_alone(mixer, stage, teacher):
    """Two documents in a row, kept apart by their positions: the loss is the mean over the tokens of each alone."""
    a, b = torch.randint(3, 64, (1, 9)), torch.randint(3, 64, (1, 15))
    calibration = torch.randint(3, 64, (2, 12))
    student = subquad.linearize(teacher, mixer, copy_qkv=mixer != "softmax", scale_ids=calibration)
    objective = make(stage, teacher, calibration)

    def measured(ids, lengths):
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        batch = {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(positions == 0, -100)}
        with torch.no_grad():
            return student(objective=objective, **objective.targets(batch)).loss.item(), objective.count(batch).item()

    packed, count = measured(torch.cat([a, b], dim=1), (9, 15))
    (first, n), (second, m) = measured(a, (9,)), measured(b, (15,))
    assert count == n + m
    assert packed == pytest.approx((n * first + m * second) / (n + m), rel=2e-4)


def test_a_teacher_that_keeps_documents_apart_is_told_from_one_that_does_not(teacher):
    assert respects_document_boundaries(teacher)
    forgetful = LlamaForCausalLM(teacher.config).eval()
    whole = forgetful.base_model.forward
    forgetful.base_model.forward = lambda position_ids=None, **kwargs: whole(**kwargs)
    assert not respects_document_boundaries(forgetful)


def test_stage_1_of_a_batch_is_the_mean_of_its_rows(teacher):
    ids = torch.randint(0, 64, (4, 24))
    student = subquad.linearize(teacher, "gla").requires_grad_(True)
    for stage in STAGES:
        objective = make(stage, teacher, ids)

        def loss(rows, objective=objective):
            return student(objective=objective, **objective.targets({"input_ids": rows})).loss.item()

        assert loss(ids) == pytest.approx((loss(ids[:1]) + 3 * loss(ids[1:])) / 4, rel=1e-4)
