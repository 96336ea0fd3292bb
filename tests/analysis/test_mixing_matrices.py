"""Statistics of matrices and hidden states against known values."""

import math

import pytest
import torch

from subquad.analysis.mixing_matrices import (
    chance_overlap,
    comparison_statistics,
    comparison_sums,
    distance_bins,
    matrix_statistics,
    matrix_sums,
    state_statistics,
    state_sums,
    sums_by_distance,
    topk_weights,
)
from tests.helpers.known_models import PREVIOUS, UNIFORM, known_heads, previous_matrix, uniform_matrix

T, TOP = 24, 4


def random_matrix(heads: int = 3, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed)).tril()


def total(parts):
    return {name: sum(part[name] for part in parts) for name in parts[0]}


def stats(M, chunk=1000):
    return matrix_statistics(total([matrix_sums(rows, i * chunk) for i, rows in enumerate(M.split(chunk, dim=1))]))


def comparison(M, A, chunk=1000):
    pairs = enumerate(zip(M.split(chunk, dim=1), A.split(chunk, dim=1), strict=True))
    return comparison_statistics(total([comparison_sums(m, a, i * chunk, TOP) for i, (m, a) in pairs]))


def similarity(X, Y, chunk=1000):
    found = state_statistics(total([state_sums(x, y) for x, y in zip(X.split(chunk), Y.split(chunk), strict=True)]))
    return found["cka"].item(), found["cosine"].item()


# ---------------------------------------------------------------------- matrices


def test_entropy_of_known_heads():
    entropy = stats(known_heads(T))["entropy"]
    assert entropy[PREVIOUS] == 0
    assert entropy[UNIFORM].item() == pytest.approx(sum(math.log(i + 1) for i in range(T)) / T, rel=1e-6)


def test_sign_and_scale_of_rows_do_not_matter():
    M = random_matrix()
    scale = torch.randn(3, T, 1, generator=torch.Generator().manual_seed(1))
    scaled, plain = (matrix_statistics({**matrix_sums(m, 0), "products": torch.eye(3)}) for m in (M * scale, M))
    torch.testing.assert_close(scaled, plain, rtol=1e-5, atol=1e-6)


def test_mass_by_distance_of_known_heads():
    mass = {name: value for name, value in stats(known_heads(T)).items() if name.startswith("mass")}
    assert {name: value[PREVIOUS] for name, value in mass.items()} == {**dict.fromkeys(mass, 0), "mass_1": 1}
    late = range(T // 2, T)
    for name, (low, high) in zip(mass, distance_bins(T), strict=True):
        expected = sum(1 / (i + 1) for d in range(low, high + 1) for i in late if i >= d) / len(late)
        assert mass[name][UNIFORM].item() == pytest.approx(expected, rel=1e-6)


def test_memory_length_of_known_heads():
    assert stats(known_heads(T))["memory_length"][PREVIOUS] == 1.5  # the mass is between distance 1 and 2
    assert stats(torch.eye(T)[None])["memory_length"][0] == 0.5


@pytest.mark.parametrize("half_life", [3.0, 16.0])
def test_memory_length_of_a_decay_is_its_half_life(half_life):
    distance = torch.arange(400.0).unsqueeze(-1) - torch.arange(400.0)
    M = torch.exp2(-distance / half_life).tril()[None]
    assert stats(M)["memory_length"].item() == pytest.approx(half_life, rel=0.02)


def test_sums_by_distance_are_sums_of_diagonals():
    M = random_matrix(heads=2, length=9)
    expected = torch.stack([torch.stack([m.diagonal(-d).sum() for d in range(9)]) for m in M])
    torch.testing.assert_close(sums_by_distance(M, 0), expected)
    torch.testing.assert_close(sums_by_distance(M[:, :4], 0) + sums_by_distance(M[:, 4:], 4), expected)


def test_distance_bins_contain_every_distance_once():
    for length in (1, 2, 9, 64):
        assert [d for low, high in distance_bins(length) for d in range(low, high + 1)] == list(range(length))
    assert distance_bins(9) == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 8)]


def test_diversity_of_known_heads():
    M = random_matrix(heads=1)
    assert stats(torch.cat([M, 3 * M]))["diversity"] == pytest.approx(0, abs=1e-6)
    assert stats(torch.stack([torch.eye(T), previous_matrix(T).tril(-1)]))["diversity"] == 1
    heads = known_heads(T).double()
    cosine = (heads[0] * heads[1]).sum() / heads[0].norm() / heads[1].norm()
    assert stats(known_heads(T))["diversity"] == pytest.approx((1 - cosine.item()) ** 0.5, rel=1e-6)
    assert "diversity" not in stats(M)


def test_matrix_compared_with_itself():
    A = random_matrix().softmax(-1).tril()
    found = comparison(A, A)
    assert found["topk_mass_overlap"].tolist() == [1, 1, 1]
    assert found["frobenius"].tolist() == [0, 0, 0]
    torch.testing.assert_close(found["row_cosine"], torch.ones(3, dtype=torch.float64))
    tied = known_heads(T)
    assert comparison(tied, tied)["topk_mass_overlap"].tolist() == [1, 1]


def test_topk_mass_overlap_by_hand():
    A, M = random_matrix(seed=1).softmax(-1).tril(), random_matrix(seed=2)
    shares = []
    for a, m in zip(A[0], M[0], strict=True):
        seen = int((a != 0).sum())
        if seen > TOP:
            of_teacher = set(a[:seen].topk(TOP).indices.tolist())
            both = of_teacher & set(m[:seen].abs().topk(TOP).indices.tolist())
            shares.append((a[list(both)].sum() / a[list(of_teacher)].sum()).item())
    assert comparison(M, A)["topk_mass_overlap"][0].item() == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    assert len(shares) == T - TOP


def test_uniform_matrix_overlaps_by_chance():
    A, M = previous_matrix(T)[None], uniform_matrix(T)[None]
    assert comparison(M, A)["topk_mass_overlap"].item() == pytest.approx(chance_overlap(T, TOP))
    assert chance_overlap(T, TOP) == pytest.approx(sum(4 / (i + 1) for i in range(4, T)) / (T - 4))
    # the one attended token is among the last four
    band = torch.ones(T, T).tril().triu(-3)[None]
    assert comparison(band, A)["topk_mass_overlap"].item() == 1
    assert comparison(torch.eye(T)[None], A)["topk_mass_overlap"].item() == pytest.approx(
        sum(3 / i for i in range(4, T)) / (T - 4)  # three places are left for the other i
    )


def test_topk_weights_share_the_last_places():
    seen = torch.ones(1, 5, dtype=torch.bool)
    found = topk_weights(torch.tensor([[[5.0, 1, 3, 1, 1]]]), seen, 3)[0, 0]
    assert found.tolist() == pytest.approx([1, 1 / 3, 1, 1 / 3, 1 / 3])
    seen = torch.tensor([[True, True, True, False, False]])
    assert topk_weights(torch.zeros(1, 1, 5), seen, 2)[0, 0].tolist() == pytest.approx([2 / 3] * 3 + [0, 0])


def test_frobenius_uses_the_best_scale():
    A, M = random_matrix(seed=1), random_matrix(seed=2) + random_matrix(seed=1)
    found = comparison(M, A)["frobenius"]
    for h in range(3):
        m, a = M[h].double(), A[h].double()
        best = min(((a - s * m).norm() / a.norm()).item() for s in torch.linspace(0, 2, 4001).tolist())
        assert found[h].item() == pytest.approx(best, rel=1e-5)
    assert comparison(3 * A, A)["frobenius"].max() < 1e-7
    assert comparison(-A, A)["frobenius"].tolist() == [1, 1, 1]  # scales are not negative


def test_row_cosine_is_the_mean_over_rows():
    A, M = random_matrix(seed=1), random_matrix(seed=2)
    expected = torch.nn.functional.cosine_similarity(M.double(), A.double(), dim=-1).mean(-1)
    torch.testing.assert_close(comparison(M, A)["row_cosine"], expected)


@pytest.mark.parametrize("chunk", [1, 5, 16, 23])
def test_row_chunks_do_not_change_results(chunk):
    M, A = random_matrix(seed=1), random_matrix(seed=2)
    torch.testing.assert_close(stats(M, chunk), stats(M), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(comparison(M, A, chunk), comparison(M, A), rtol=1e-12, atol=1e-12)


# ---------------------------------------------------------------------- hidden states


def test_cka_equals_its_kernel_form():
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(30, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 4 for _ in range(2))
    found, _ = similarity(X, Y, chunk=7)
    X, Y = (Z.double() - Z.double().mean(0) for Z in (X, Y))
    K, L = X @ X.T, Y @ Y.T
    assert found == pytest.approx(((K * L).sum() / (K * K).sum().sqrt() / (L * L).sum().sqrt()).item(), rel=1e-9)
    assert 0.05 < found < 0.95


def test_cka_is_invariant_to_rotation_unlike_cosine():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 6, generator=generator).double()
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    cka, cosine = similarity(X, 3 * X @ rotation + 1)
    assert cka == pytest.approx(1, abs=1e-9)
    assert abs(cosine) < 0.8
    assert similarity(X, torch.randn(200, 6, generator=generator))[0] < 0.3
