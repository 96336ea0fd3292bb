"""The losses of all stages against their definitions, and their means against other batch sizes."""

import pytest
import torch
import torch.nn.functional as F

from subquad.distill.distillation_loss import (
    LogProbs,
    LossOptions,
    distillation_loss,
    divergence_grad,
    divergence_per_token,
)
from subquad.distill.layerwise import LayerLosses
from subquad.distill.stage1_matrix_mixing import matrix_distance
from subquad.distill.stage2_hidden_alignment import output_distance

DIVERGENCES = ("forward", "reverse", "jsd")


def logits(B=2, T=9, V=17, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    return x.requires_grad_() if grad else x


def random_labels(B=2, T=9, V=17):
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(3))


def kl_divergence(p, q):
    return (p * (p / q).log()).sum().item()


def defined_divergence(divergence, p, q, beta):
    """p: the teacher's distribution, q: the student's."""
    if divergence == "forward":
        return kl_divergence(p, q)
    if divergence == "reverse":
        return kl_divergence(q, p)
    m = beta * p + (1 - beta) * q
    return beta * kl_divergence(p, m) + (1 - beta) * kl_divergence(q, m)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ignored", [0, 3])
def test_distillation_loss_equals_its_definition(divergence, temperature, ignored):
    student, teacher, labels = logits(seed=1), logits(seed=2), random_labels()
    labels[0, :ignored] = -100
    options = LossOptions(0.3, 0.7, temperature, divergence, beta=0.2)
    loss, ce, kl = distillation_loss(student, teacher, labels, options)
    expected_ce, expected_kl, n = 0.0, 0.0, 0
    for b in range(2):
        for t in range(8):
            if labels[b, t + 1] == -100:
                continue
            n += 1
            expected_ce -= F.log_softmax(student[b, t], -1)[labels[b, t + 1]].item()
            p = F.softmax(teacher[b, t] / temperature, -1)
            q = F.softmax(student[b, t] / temperature, -1)
            expected_kl += defined_divergence(divergence, p, q, 0.2) * temperature**2
    assert ce.item() == pytest.approx(expected_ce / n, rel=1e-9)
    assert kl.item() == pytest.approx(expected_kl / n, rel=1e-9)
    assert loss.item() == pytest.approx((0.3 * expected_ce + 0.7 * expected_kl) / n, rel=1e-9)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_grad_matches_autograd(divergence, beta):
    x, log_p = logits(seed=1, grad=True), logits(seed=2).mul(3).log_softmax(-1)
    log_q = x.mul(3).log_softmax(-1)
    expected = torch.autograd.grad(divergence_per_token(LogProbs.of(log_p, log_q), divergence, beta).sum(), x)[0]
    found = 3 * divergence_grad(LogProbs.of(log_p, log_q.detach()), divergence, beta)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_jensen_shannon_tends_to_both_kl_divergences():
    """GKD: divided by beta it tends to the forward KL, by 1 - beta to the reverse KL; at 1/2 it is symmetric."""
    log_p, log_q = logits(seed=1).log_softmax(-1), logits(seed=2).log_softmax(-1)
    forward, reverse = (divergence_per_token(LogProbs.of(log_p, log_q), d, 0.5) for d in ("forward", "reverse"))
    small, large = (divergence_per_token(LogProbs.of(log_p, log_q), "jsd", beta) for beta in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(small / 1e-6, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(large / 1e-6, reverse, rtol=1e-4, atol=0)
    swapped = divergence_per_token(LogProbs.of(log_q, log_p), "jsd", 0.5)
    torch.testing.assert_close(divergence_per_token(LogProbs.of(log_p, log_q), "jsd", 0.5), swapped)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergences_are_finite_where_probabilities_underflow(divergence):
    """exp(-200) is 0 in float32."""
    log_p = torch.tensor([[0.0, -200.0, -200.0]]).log_softmax(-1)
    log_q = torch.tensor([[0.0, -200.0, -5.0]]).log_softmax(-1)
    for a, b in ((log_p, log_q), (log_q, log_p)):
        assert divergence_per_token(LogProbs.of(a, b), divergence, 0.5).isfinite().all()
        assert divergence_grad(LogProbs.of(a, b), divergence, 0.5).isfinite().all()


def test_forward_divergence_and_its_gradient_with_masked_vocabulary():
    """The teacher's head gives -inf for padded tokens."""
    student, teacher, labels = logits(seed=1, grad=True), logits(seed=2), random_labels(V=12)
    teacher[..., 12:] = -torch.inf
    loss, _, kl = distillation_loss(student, teacher, labels, LossOptions())
    p, q = (F.softmax(x[:, :-1], -1) for x in (teacher, student))
    assert kl.item() == pytest.approx((p[..., :12] * (p / q)[..., :12].log()).sum(-1).mean().item())
    loss.backward()
    assert student.grad.isfinite().all()


def test_chunk_size_of_distillation_loss_has_no_effect(monkeypatch):
    import subquad.distill.distillation_loss as module

    student, teacher = logits(seed=1, grad=True), logits(seed=2)
    labels = random_labels()
    results = []
    for chunk in (1, 5, 1024):
        monkeypatch.setattr(module, "CHUNK", chunk)
        loss, _, _ = distillation_loss(student, teacher, labels, LossOptions())
        results.append((loss.item(), torch.autograd.grad(loss, student)[0]))
    for value, grad in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_divergence_from_itself_is_zero(divergence):
    x = logits()
    _, _, kl = distillation_loss(x, x, random_labels(), LossOptions(divergence=divergence))
    assert kl.item() == pytest.approx(0.0, abs=1e-7)


def test_no_teacher_logits_needed_with_kl_weight_0():
    student, labels = logits(grad=True), random_labels()
    loss, ce, kl = distillation_loss(student, None, labels, LossOptions(kl_weight=0.0))
    expected = distillation_loss(student, student, labels, LossOptions())[1]
    assert loss.item() == ce.item() == pytest.approx(expected.item())
    assert kl.item() == 0
    with pytest.raises(ValueError, match="teacher_logits"):
        distillation_loss(student, None, labels, LossOptions())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"divergence": "backward"}, "divergence: got 'backward'"),
        ({"divergence": "jsd", "beta": 0.0}, "beta: got 0.0"),
        ({"temperature": 0.0}, "temperature: got 0.0"),
    ],
)
def test_invalid_loss_options_are_refused(options, key):
    with pytest.raises(ValueError, match=key):
        LossOptions(**options)


def test_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"vocabulary: got 17 .* 19"):
        distillation_loss(logits(), logits(V=19), random_labels(), LossOptions())


def rows_of(matrix):
    return lambda rows: matrix[:, :, rows]


def distance(matrix, target, scale_invariant, row_chunk_size=64):
    return matrix_distance(rows_of(matrix), rows_of(target), matrix.shape[-1], scale_invariant, row_chunk_size)


def test_losses_are_means_over_the_batch():
    student, teacher = logits(B=4, seed=1), logits(B=4, seed=2)
    labels = random_labels(B=4)

    def loss(rows):
        return distillation_loss(student[rows], teacher[rows], labels[rows], LossOptions())[0]

    halves = [loss(slice(i, i + 2)) for i in (0, 2)]
    assert loss(slice(4)).item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-6)
    A, M = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    for scale_invariant in (False, True):
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


def test_output_distance_of_zeros_is_one():
    target = torch.randn(2, 5, 7)
    target_norm = target.square().sum(-1).mean()
    assert output_distance(torch.zeros_like(target), target, target_norm).item() == pytest.approx(1.0)
    assert output_distance(target, target, target_norm).item() == 0


def layerwise_loss(losses, parameters):
    """The losses are added last layer first, without gradients around, as hooks of a teacher do."""
    layers = LayerLosses(parameters)
    with torch.no_grad():
        for index, loss in reversed(list(enumerate(losses))):
            layers.add(index, loss)
    return layers.mean()


def test_layerwise_loss_is_the_mean_with_its_gradient():
    a, b, frozen = (torch.randn(3, requires_grad=True) for _ in range(3))
    frozen.requires_grad_(False)
    losses = [lambda: (a**2).sum(), lambda: (b * frozen).sum() ** 2]
    value, per_layer = layerwise_loss(losses, [[a], [b, frozen]])
    assert value.item() == pytest.approx(per_layer.mean().item())
    (3 * value).backward()
    torch.testing.assert_close(a.grad, 3 * a.detach())
    torch.testing.assert_close(b.grad, 3 * (b.detach() * frozen).sum() * frozen)


def test_layerwise_loss_holds_the_graph_of_one_layer():
    """The graphs of earlier layers are freed when a layer is computed."""
    import weakref

    alive = []

    def loss(parameter):
        assert all(ref() is None for ref in alive)
        hidden = parameter * 2
        alive.append(weakref.ref(hidden))
        return (hidden**2).sum()

    parameters = [torch.randn(3, requires_grad=True) for _ in range(3)]
    layerwise_loss([lambda p=p: loss(p) for p in parameters], [[p] for p in parameters])
    assert len(alive) == 3


def test_layerwise_loss_without_gradients():
    a = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        value, _ = layerwise_loss([lambda: (a**2).sum()], [[a]])
    assert not value.requires_grad
