"""Inputs and teachers at the ends of what numbers hold: no output, state, loss or gradient is infinite or NaN."""

import pytest
import torch

import subquad
from subquad.config import EndToEndStage, HiddenStage, MatrixStage
from subquad.registry import STAGES
from tests.helpers.students import KINDS, MIXERS, make_student
from tests.helpers.teachers import tiny_teacher

ALL = {**{name: {"default": name} for name in MIXERS}, **KINDS}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SINK = 5


@pytest.fixture(scope="module")
def sink_teacher():
    """A teacher whose hidden states at token `SINK` are about 10,000 in two channels, as at the first token of many
    pretrained models."""
    teacher = tiny_teacher()
    with torch.no_grad():
        teacher.model.embed_tokens.weight[SINK, :2] = 1e4
    return teacher


def rows(length: int = 40):
    ids = torch.arange(2 * length).view(2, length) % 50 + 6
    ids[:, 0] = SINK
    return ids


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_huge_activations(sink_teacher, kind, dtype):
    student = subquad.linearize(sink_teacher, layer_types=ALL[kind], calibration_ids=rows()).to(dtype)
    with torch.no_grad():
        out = student(input_ids=rows(), use_cache=True)
        step = student(input_ids=rows()[:, :1], past_key_values=out.past_key_values, use_cache=True)
    assert out.logits.isfinite().all()
    assert step.logits.isfinite().all()


@pytest.mark.parametrize("stage", ["matrix", "hidden", "end_to_end"])
@pytest.mark.parametrize("kind", ALL)
def test_training_on_huge_activations(sink_teacher, kind, stage):
    student = subquad.linearize(sink_teacher, layer_types=ALL[kind], scale_ids=rows())
    options = {"matrix": MatrixStage, "hidden": HiddenStage, "end_to_end": EndToEndStage}[stage](tokens=1, lr=1.0)
    objective = STAGES[stage](sink_teacher, options, scale_ids=rows())
    with torch.autocast("cpu", torch.bfloat16):
        loss = student(objective=objective, **objective.forward_kwargs({"input_ids": rows()})).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ALL)
def test_rows_of_one_token_and_of_padding(kind, dtype):
    student = make_student(tiny_teacher(), layer_types=ALL[kind]).to(dtype)
    mask = torch.tensor([[0] * 6, [0] * 5 + [1], [1] * 6])
    with torch.no_grad():
        one = student(input_ids=torch.tensor([[7]]), use_cache=True)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        padded = student(input_ids=torch.full((3, 6), 7), attention_mask=mask, position_ids=positions, use_cache=True)
        step = student(
            input_ids=torch.full((3, 1), 7),
            attention_mask=torch.cat([mask, torch.ones(3, 1).long()], 1),
            past_key_values=padded.past_key_values,
        )
    assert one.logits.isfinite().all()
    assert padded.logits.isfinite().all()
    assert step.logits.isfinite().all()
    tolerance = 1e-3 if dtype == torch.float32 else 0.1  # a norm amplifies the rounding of small outputs
    assert (padded.logits[1, -1] - one.logits[0, -1]).abs().max() <= tolerance * one.logits.abs().max()


def gradients(student, loss) -> dict[str, torch.Tensor]:
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ALL)
def test_gradient_scaling(kind):
    """A power of two times a loss has as many times its gradients, bit for bit: no backward pass has a bound or an
    epsilon of its own."""
    student = make_student(tiny_teacher(), layer_types=ALL[kind])
    plain = gradients(student, student(input_ids=rows(), labels=rows()).loss)
    scaled = gradients(student, student(input_ids=rows(), labels=rows()).loss * 2.0**16)
    assert all(torch.equal(scaled[name], plain[name] * 2.0**16) for name in plain)


@pytest.mark.parametrize("kind", ALL)
def test_training_in_float16_with_a_gradient_scaler(kind):
    """The scaler finds a scale at which no gradient overflows. There they are nearer to those of float32 than the
    gradients of bfloat16: what is small is not rounded to zero."""
    student = make_student(tiny_teacher(), layer_types=ALL[kind])
    exact = gradients(student, student(input_ids=rows(), labels=rows()).loss)

    def error(found) -> torch.Tensor:
        return torch.stack([(found[name] - exact[name]).norm() for name in exact]).norm()

    with torch.autocast("cpu", torch.bfloat16):
        coarse = gradients(student, student(input_ids=rows(), labels=rows()).loss)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD(student.parameters(), lr=0.0)
    for _ in range(12):  # from 65,536, each overflow halves it
        with torch.autocast("cpu", torch.float16):
            found = gradients(student, scaler.scale(student(input_ids=rows(), labels=rows()).loss))
        scale = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() == scale:
            break
    assert scaler.get_scale() == scale >= 2.0**6
    assert error({name: gradient / scale for name, gradient in found.items()}) < 0.6 * error(coarse)


@pytest.mark.parametrize("stage", ["matrix", "hidden", "end_to_end"])
@pytest.mark.parametrize("kind", ALL)
def test_deterministic_algorithms(kind, stage):
    """`torch.use_deterministic_algorithms` refuses nothing that a stage computes, and two passes are equal."""
    teacher = tiny_teacher()
    student = make_student(teacher, layer_types=ALL[kind])
    options = {"matrix": MatrixStage, "hidden": HiddenStage, "end_to_end": EndToEndStage}[stage](tokens=1, lr=1.0)
    objective = STAGES[stage](teacher, options, scale_ids=rows())
    inputs = {"input_ids": rows()}
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (
            gradients(student, student(objective=objective, **objective.forward_kwargs(inputs)).loss) for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALL)
def test_a_hundred_thousand_repeats(kind):
    """State and normalizers neither overflow nor vanish: what the student predicts stays finite."""
    student, cache = make_student(tiny_teacher(max_position_embeddings=131_072), layer_types=ALL[kind]), None
    with torch.no_grad():
        for _ in range(50):
            out = student(input_ids=torch.full((1, 2000), 7), past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            assert out.logits.isfinite().all()
