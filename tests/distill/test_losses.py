"""The losses against what they are defined as, and their means against other batchings."""

import pytest
import torch
import torch.nn.functional as F

from subquad.distill.losses import distillation_loss, layerwise, matrix_distance, output_distance


def logits(B=2, T=9, V=17, seed=0, grad=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, V, generator=g, dtype=torch.float64)
    return x.requires_grad_() if grad else x


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("ignored", [0, 3])
def test_distillation_loss_is_its_definition(temperature, ignored):
    student, teacher = logits(seed=1), logits(seed=2)
    labels = torch.randint(0, 17, (2, 9), generator=torch.Generator().manual_seed(3))
    labels[0, :ignored] = -100
    loss, ce, kl = distillation_loss(student, teacher, labels, 0.3, 0.7, temperature)
    expected_ce, expected_kl, n = 0.0, 0.0, 0
    for b in range(2):
        for t in range(8):
            if labels[b, t + 1] == -100:
                continue
            n += 1
            expected_ce -= F.log_softmax(student[b, t], -1)[labels[b, t + 1]].item()
            p = F.softmax(teacher[b, t] / temperature, -1)
            q = F.softmax(student[b, t] / temperature, -1)
            expected_kl += (p * (p / q).log()).sum().item() * temperature**2
    assert ce.item() == pytest.approx(expected_ce / n, rel=1e-5)
    assert kl.item() == pytest.approx(expected_kl / n, rel=1e-5)
    assert loss.item() == pytest.approx((0.3 * expected_ce + 0.7 * expected_kl) / n, rel=1e-5)


def test_distillation_loss_chunks_change_nothing(monkeypatch):
    import subquad.distill.losses as module

    student, teacher = logits(seed=1, grad=True), logits(seed=2)
    labels = torch.randint(0, 17, (2, 9))
    results = []
    for chunk in (1, 5, 1024):
        monkeypatch.setattr(module, "CHUNK", chunk)
        loss, _, _ = distillation_loss(student, teacher, labels)
        results.append((loss.item(), torch.autograd.grad(loss, student)[0]))
    for value, grad in results[1:]:
        assert value == pytest.approx(results[0][0], rel=1e-6)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-8)


def test_distillation_loss_of_a_model_with_itself_is_entropy():
    x = logits()
    labels = torch.randint(0, 17, (2, 9))
    _, _, kl = distillation_loss(x, x, labels)
    assert kl.item() == pytest.approx(0.0, abs=1e-7)


def test_losses_are_means_over_the_batch():
    student, teacher = logits(B=4, seed=1), logits(B=4, seed=2)
    labels = torch.randint(0, 17, (4, 9))
    whole = distillation_loss(student, teacher, labels)[0]
    halves = [distillation_loss(student[i : i + 2], teacher[i : i + 2], labels[i : i + 2])[0] for i in (0, 2)]
    assert whole.item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-6)
    A, M = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    for free in (False, True):
        halves = [matrix_distance(M[i : i + 2], A[i : i + 2], free) for i in (0, 2)]
        assert matrix_distance(M, A, free).item() == pytest.approx(sum(h.item() for h in halves) / 2, rel=1e-6)


def test_matrix_distance():
    A = torch.tensor([[[[1.0, 0.0], [0.5, 0.5]]]])
    assert matrix_distance(A, A, False).item() == 0
    assert matrix_distance(torch.zeros_like(A), A, False).item() == pytest.approx((1 + 0.5) / 2)
    # a free scale forgives any positive factor, and a matrix against A is no better than none
    assert matrix_distance(7 * A, A, True).item() == pytest.approx(0, abs=1e-6)
    assert matrix_distance(-A, A, True).item() == pytest.approx((1 + 0.5) / 2)
    assert matrix_distance(torch.zeros_like(A), A, True).item() == pytest.approx((1 + 0.5) / 2)
    assert matrix_distance(7 * A, A, False).item() > 1
    # the scale is the best one: no other does better
    M = torch.rand_like(A)
    best = matrix_distance(M, A, True).item()
    assert all(best <= matrix_distance(s * M, A, False).item() + 1e-7 for s in torch.linspace(0, 3, 61))


def test_output_distance_of_silence_is_one():
    target = torch.randn(2, 5, 7)
    power = target.square().sum(-1).mean()
    assert output_distance(torch.zeros_like(target), target, power).item() == pytest.approx(1.0)
    assert output_distance(target, target, power).item() == 0


def test_layerwise_is_the_mean_and_its_gradient():
    a, b, frozen = (torch.randn(3, requires_grad=True) for _ in range(3))
    frozen.requires_grad_(False)
    losses = [lambda: (a**2).sum(), lambda: (b * frozen).sum() ** 2]
    value, per_layer = layerwise(losses, [[a], [b, frozen]])
    assert value.item() == pytest.approx(per_layer.mean().item())
    (3 * value).backward()
    torch.testing.assert_close(a.grad, 3 * a.detach())
    torch.testing.assert_close(b.grad, 3 * (b.detach() * frozen).sum() * frozen)


def test_layerwise_keeps_one_graph_alive():
    """No graph of an earlier layer is alive when a later layer is computed."""
    import weakref

    alive = []

    def loss(parameter):
        assert all(ref() is None for ref in alive)
        hidden = parameter * 2
        alive.append(weakref.ref(hidden))
        return (hidden**2).sum()

    parameters = [torch.randn(3, requires_grad=True) for _ in range(3)]
    layerwise([lambda p=p: loss(p) for p in parameters], [[p] for p in parameters])
    assert len(alive) == 3


def test_layerwise_without_gradients():
    a = torch.randn(3, requires_grad=True)
    with torch.no_grad():
        value, _ = layerwise([lambda: (a**2).sum()], [[a]])
    assert not value.requires_grad
