"""The loss of stage 3 and its gradients against autograd through the definition on full logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

from subquad.config import EndToEndStage
from subquad.distill import distillation_loss as module
from subquad.distill.distillation_loss import distillation_loss, divergence
from subquad.distill.lm_head import Head

N, D, TEACHER_D, V = 23, 12, 10, 41
DIVERGENCES = ("forward", "reverse", "jsd")
HEADS = {
    "bare": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.4},
    "softcap": {"softcap": 3.0},
    "everything": {"bias": True, "scale": 1.7, "softcap": 2.0},
    "logits": None,
}


def stage(**options):
    return EndToEndStage(tokens=1, lr=1.0, **options)


class Case:
    """Hidden states, labels of which a fifth is ignored, and two heads; or logits without heads."""

    def __init__(self, kind="everything", dtype=torch.float32, teacher_kind=None):
        g = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        def make(kind, width):
            if HEADS[kind] is None:
                return random(N, V), None
            options = dict(HEADS[kind])
            bias = random(V) if options.pop("bias", False) else None
            return random(N, width), Head(random(V, width), bias, **options)

        self.hidden, self.head = make(kind, D)
        self.teacher_hidden, self.teacher_head = make(teacher_kind or kind, TEACHER_D)
        self.labels = torch.randint(V, (N,), generator=g)
        self.labels[::5] = -100
        for x in (self.hidden, *(self.head or ())[:2]):
            if x is not None:
                x.requires_grad_()

    @property
    def inputs(self):
        return [x for x in (self.hidden, *(self.head or ())[:2]) if x is not None and x.requires_grad]

    def loss(self, chunk=7, **options):
        inputs = self.hidden, self.teacher_hidden, self.labels, self.head, self.teacher_head
        return distillation_loss(*inputs, stage(**options), chunk)

    def definition(self, **options):
        student = self.hidden if self.head is None else self.head.logits(self.hidden)
        teacher = self.teacher_hidden if self.teacher_head is None else self.teacher_head.logits(self.teacher_hidden)
        return definition(student, teacher.detach(), self.labels, **options)


def kl(p, q):
    return (p * (p / q).log()).sum(-1)


def definition(student, teacher, labels, **options):
    """The loss from logits `[N, V]`; (loss, cross-entropy, divergence)."""
    s = stage(**options)
    student, teacher, labels = (x[labels != -100] for x in (student, teacher, labels))
    student, teacher = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (student, teacher))
    p, q = ((x / s.temperature).softmax(-1) for x in (teacher, student))
    m = s.jsd_beta * p + (1 - s.jsd_beta) * q
    jsd = s.jsd_beta * kl(p, m) + (1 - s.jsd_beta) * kl(q, m)
    per_token = {"forward": kl(p, q), "reverse": kl(q, p), "jsd": jsd}[s.divergence]
    ce = -student.log_softmax(-1).gather(1, labels[:, None]).mean()
    total = per_token.mean() * s.temperature**2 if s.kl_weight else torch.zeros_like(ce)
    return s.ce_weight * ce + s.kl_weight * total, ce, total


def assert_equal(found, expected, inputs, tolerance=1e-5):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    for a, b in zip(*(torch.autograd.grad(x[0], inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 0.7), (0.0, 1.0)], ids=["ce1-kl1", "ce.3-kl.7", "ce0-kl1"])
@pytest.mark.parametrize("temperature", [1.0, 2.0], ids=["tau1", "tau2"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    "kinds", [*((k, k) for k in HEADS), ("bare", "logits"), ("logits", "bias")], ids=lambda kinds: "-".join(kinds)
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["f32", "f64"])
def test_loss_equals_its_definition(kinds, divergence, temperature, weights, dtype, tolerance, monkeypatch):
    case = Case(kinds[0], dtype, kinds[1])
    monkeypatch.setattr(module, "PIECE_BYTES", 3 * V * case.hidden.itemsize)
    options = {"divergence": divergence, "jsd_beta": 0.3, "temperature": temperature}
    options |= dict(zip(("ce_weight", "kl_weight"), weights, strict=True))
    assert_equal(case.loss(**options), case.definition(**options), case.inputs, tolerance)


@pytest.mark.parametrize("chunk", [1, 6, 18, 23, 512])
def test_chunk_size_has_no_effect(chunk):
    case = Case()
    assert_equal(case.loss(chunk), case.definition(), case.inputs)


def test_tied_head_gets_both_gradients():
    case = Case()
    tokens = torch.randint(V, (N,))

    def hidden():
        return torch.tanh(nn.functional.embedding(tokens, case.head.weight))

    inputs = [case.head.weight, case.head.bias]
    case.hidden = hidden()
    found = case.loss()
    case.hidden = hidden()
    assert_equal(found, case.definition(), inputs)


def test_loss_is_zero_if_all_labels_are_ignored():
    case = Case()
    case.labels[:] = -100
    loss, ce, divergence = case.loss()
    assert (loss.item(), ce.item(), divergence.item()) == (0, 0, 0)
    assert all(not g.any() for g in torch.autograd.grad(loss, case.inputs))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_gradients_only_where_required(frozen):
    case = Case()
    (case.hidden if frozen == "hidden" else getattr(case.head, frozen)).requires_grad_(False)
    case.teacher_hidden.requires_grad_()
    case.teacher_head.weight.requires_grad_()
    assert len(case.inputs) == 2
    assert_equal(case.loss(), case.definition(), case.inputs)
    case.loss()[0].backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_head.weight.grad is None


def test_no_grad():
    case = Case()
    with torch.no_grad():
        found = case.loss()
    assert not any(x.requires_grad for x in found)
    loss, ce, divergence = case.loss()
    assert [x.requires_grad for x in (loss, ce, divergence)] == [True, False, False]
    torch.testing.assert_close(found, (loss.detach(), ce, divergence))


def test_no_teacher_with_kl_weight_0():
    case = Case()
    expected = case.definition(kl_weight=0.0)
    case.teacher_hidden = case.teacher_head = None
    assert_equal(case.loss(kl_weight=0.0), expected, case.inputs)
    with pytest.raises(ValueError, match="teacher: got None"):
        case.loss()


@pytest.mark.parametrize("kind", ["bare", "logits"])
def test_another_vocabulary_is_refused(kind):
    case = Case(kind)
    case.teacher_hidden, case.teacher_head = torch.randn(N, V + 3), None
    with pytest.raises(ValueError, match=rf"vocabulary: got {V} .* {V + 3}"):
        case.loss()


def test_gradients_accumulate():
    case = Case()
    (case.loss()[0] / 4).backward()
    (case.loss(divergence="reverse")[0] / 4).backward()
    losses = case.definition()[0] + case.definition(divergence="reverse")[0]
    for x, g in zip(case.inputs, torch.autograd.grad(losses / 4, case.inputs), strict=True):
        torch.testing.assert_close(x.grad, g, rtol=1e-5, atol=1e-5)


def test_second_backward_is_refused():
    case = Case()
    loss = case.loss()[0]
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(loss, case.hidden, create_graph=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="retain_graph"):
        loss.backward()


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_bfloat16(autocast):
    """Errors against float64 are no larger than those of the definition in bfloat16."""
    exact = Case(dtype=torch.float64)
    case = Case(dtype=torch.float32 if autocast else torch.bfloat16)
    reference = torch.autograd.grad(exact.definition()[0], exact.inputs)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, plain = case.loss(), case.definition()
    assert found[0].dtype == torch.float32
    torch.testing.assert_close(found[0].double(), exact.definition()[0], rtol=0.02, atol=0)
    gradients = [torch.autograd.grad(x[0], case.inputs) for x in (found, plain)]
    for x, ours, theirs, true in zip(case.inputs, *gradients, reference, strict=True):
        assert ours.dtype == x.dtype
        error, allowed = (float((g.double() - true).norm() / true.norm()) for g in (ours, theirs))
        assert error <= max(1.1 * allowed, 0.01)


# ---------------------------------------------------------------------- the divergences


def divergence_of(log_p, log_q, name, beta=0.5):
    return divergence(log_p, log_q, log_q.exp(), stage(divergence=name, jsd_beta=beta))


def random_log_probabilities(seed):
    return torch.randn(9, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).log_softmax(-1)


def test_jensen_shannon_tends_to_both_kl_divergences():
    """GKD: divided by beta it tends to the forward KL, by 1 - beta to the reverse KL; at 1/2 it is symmetric."""
    log_p, log_q = random_log_probabilities(1), random_log_probabilities(2)
    forward, reverse = (divergence_of(log_p, log_q, name)[0] for name in ("forward", "reverse"))
    small, large = (divergence_of(log_p, log_q, "jsd", beta)[0] for beta in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(small / 1e-6, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(large / 1e-6, reverse, rtol=1e-4, atol=0)
    torch.testing.assert_close(divergence_of(log_p, log_q, "jsd")[0], divergence_of(log_q, log_p, "jsd")[0])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_where_probabilities_underflow_or_agree(name):
    """exp(-200) is 0 in float32."""
    log_p = torch.tensor([[0.0, -200.0, -200.0]]).log_softmax(-1)
    log_q = torch.tensor([[0.0, -200.0, -5.0]]).log_softmax(-1)
    for a, b in ((log_p, log_q), (log_q, log_p)):
        assert all(x.isfinite().all() for x in divergence_of(a, b, name))
    same = random_log_probabilities(1)
    assert all(x.abs().max() < 1e-7 for x in divergence_of(same, same, name))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("masked", ["teacher", "student", "both"])
def test_probability_0(name, masked):
    """A logit of -inf is the limit of low ones; the divergence is infinite only where its limit is."""
    masked_logits = {"teacher": [0], "student": [1], "both": [0, 1]}[masked]

    def found(value):
        logits = [random_log_probabilities(i) for i in (1, 2)]
        for i in masked_logits:
            logits[i][:, V // 2 :] = value
        teacher, student = logits[0], logits[1].requires_grad_()
        loss, ce, kl = distillation_loss(student, teacher, torch.arange(9), None, None, stage(divergence=name))
        return torch.stack([ce, kl]), torch.autograd.grad(loss, student)[0]

    values, gradient = found(-torch.inf)
    if (name, masked) in (("forward", "student"), ("reverse", "teacher")):
        assert values[1] == torch.inf
    else:
        limit = found(-1e4)
        torch.testing.assert_close(values, limit[0])
        torch.testing.assert_close(gradient, limit[1])


# ---------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.sample
def test_loss_needs_a_quarter_of_the_memory():
    """SmolLM2-135M's head on 4,096 tokens, each loss in its own process."""

    def peak(way):
        command = [sys.executable, "-m", "benchmarks.loss", "--peak", way]
        root = Path(__file__).parents[2]
        return int(subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout)

    assert peak("fused") <= peak("straightforward") / 4
