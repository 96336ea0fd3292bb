"""Diagnostics against cases with known answers: made matrices, a head of the previous token, decays of known length."""

import math
import os
import subprocess
import sys

import pytest
import torch
from handmade import PREVIOUS, UNIFORM, previous_and_uniform, previous_matrix, uniform_matrix

import subquad
from subquad.errors import UserError
from subquad.evaluate.decays import half_lives
from subquad.evaluate.diagnostics import (
    comparison_rows,
    diagnostics_rows,
    half_life_rows,
    matrices_beside,
    profile_rows,
)
from subquad.evaluate.matrices import Comparison, Profile, distance_bins, sums_by_distance, top_weights
from subquad.evaluate.origins import divergence, error_rows, origin_rows, swap_rows
from subquad.evaluate.quality import compare
from subquad.evaluate.results import one, select
from subquad.evaluate.stack import Stack, stacks
from subquad.evaluate.states import Likeness, state_rows

CPU = torch.device("cpu")
TEXT = torch.arange(3, 15)[None]
T = 24


def random_matrix(heads: int = 3, length: int = T, seed: int = 0) -> torch.Tensor:
    return torch.randn(heads, length, length, generator=torch.Generator().manual_seed(seed)).tril()


def profile(M: torch.Tensor, block: int = 1000) -> Profile:
    found = Profile(len(M), M.shape[-1], CPU)
    for first in range(0, M.shape[-1], block):
        found.add(M[:, first : first + block], first)
    return found


def comparison(M: torch.Tensor, A: torch.Tensor, top: int = 4, block: int = 1000) -> Comparison:
    found = Comparison(len(M), top, CPU)
    for first in range(0, M.shape[-1], block):
        found.add(M[:, first : first + block], A[:, first : first + block], first)
    return found


def made_heads() -> torch.Tensor:
    return torch.stack([previous_matrix(T), uniform_matrix(T)])


# ---------------------------------------------------------------------- of made matrices


def test_entropy_of_known_heads():
    entropy = profile(made_heads()).entropy()
    assert entropy[PREVIOUS] == 0
    assert entropy[UNIFORM].item() == pytest.approx(sum(math.log(i + 1) for i in range(T)) / T, rel=1e-6)


def test_signs_and_scales_of_rows_do_not_change_what_is_attended():
    M = random_matrix()
    scale = torch.randn(3, T, 1, generator=torch.Generator().manual_seed(1))
    for name in ("entropy", "memory_length", "mass"):
        torch.testing.assert_close(
            getattr(profile(M * scale), name)(), getattr(profile(M), name)(), rtol=1e-5, atol=1e-6
        )


def test_mass_by_distance_of_known_heads():
    mass = profile(made_heads()).mass()
    assert mass[PREVIOUS].tolist() == [0, 1, *[0] * (T - 2)]
    late = range(T // 2, T)
    expected = [sum(1 / (i + 1) for i in late if i >= d) / len(late) for d in range(T)]
    assert mass[UNIFORM].tolist() == pytest.approx(expected, rel=1e-6)


def test_memory_length_of_known_heads():
    assert profile(made_heads()).memory_length()[PREVIOUS] == 1.5  # all of it between distance 1 and 2
    assert profile(torch.eye(T)[None]).memory_length()[0] == 0.5


@pytest.mark.parametrize("half_life", [3.0, 16.0])
def test_memory_length_of_a_decay_is_its_half_life(half_life):
    distance = torch.arange(400.0).unsqueeze(-1) - torch.arange(400.0)
    M = torch.exp2(-distance / half_life).tril()[None]
    assert profile(M).memory_length().item() == pytest.approx(half_life, rel=0.02)


def test_sums_by_distance_are_those_of_the_diagonals():
    M = random_matrix(heads=2, length=9)
    expected = torch.stack([torch.stack([m.diagonal(-d).sum() for d in range(9)]) for m in M])
    torch.testing.assert_close(sums_by_distance(M, 0), expected)
    parts = sums_by_distance(M[:, :4], 0) + sums_by_distance(M[:, 4:], 4)
    torch.testing.assert_close(parts, expected)


def test_distance_bins_hold_every_distance_once():
    for length in (1, 2, 9, 64):
        distances = [d for low, high in distance_bins(length) for d in range(low, high + 1)]
        assert distances == list(range(length))
    assert distance_bins(9) == [(0, 0), (1, 1), (2, 3), (4, 7), (8, 8)]


def test_diversity_of_known_heads():
    M = random_matrix(heads=1)
    assert profile(torch.cat([M, 3 * M])).diversity() == pytest.approx(0, abs=1e-6)
    assert profile(torch.stack([torch.eye(T), previous_matrix(T).tril(-1)])).diversity() == 1
    heads = made_heads().double()
    cosine = (heads[0] * heads[1]).sum() / heads[0].norm() / heads[1].norm()
    assert profile(made_heads()).diversity() == pytest.approx((1 - cosine.item()) ** 0.5, rel=1e-6)
    assert profile(M).diversity() is None


def test_a_matrix_compared_with_itself():
    A = random_matrix().softmax(-1).tril()
    found = comparison(A, A)
    assert found.overlap().tolist() == [1, 1, 1]
    assert found.frobenius().tolist() == [0, 0, 0]
    torch.testing.assert_close(found.row_cosine(), torch.ones(3, dtype=torch.float64))


def test_ties_do_not_keep_a_matrix_from_overlapping_with_itself():
    assert comparison(made_heads(), made_heads()).overlap().tolist() == [1, 1]


def test_overlap_is_the_share_of_the_mass_on_the_tokens_that_both_choose():
    A, M = random_matrix(seed=1).softmax(-1).tril(), random_matrix(seed=2)
    shares = []
    for a, m in zip(A[0], M[0], strict=True):
        seen = int((a != 0).sum())
        if seen > 4:
            theirs = set(a[:seen].topk(4).indices.tolist())
            both = theirs & set(m[:seen].abs().topk(4).indices.tolist())
            shares.append((a[list(both)].sum() / a[list(theirs)].sum()).item())
    assert comparison(M, A).overlap()[0].item() == pytest.approx(sum(shares) / len(shares), rel=1e-6)
    assert len(shares) == T - 4


def test_one_that_attends_to_all_alike_overlaps_by_chance():
    A, M = previous_matrix(T)[None], uniform_matrix(T)[None]
    found = comparison(M, A)
    assert found.overlap().item() == pytest.approx(found.chance())
    assert found.chance() == pytest.approx(sum(4 / (i + 1) for i in range(4, T)) / (T - 4))
    # its mass lies on one token, which is among the four of one that sees the last four
    band = torch.ones(T, T).tril().triu(-3)[None]
    assert comparison(band, A).overlap().item() == 1
    assert comparison(torch.eye(T)[None], A).overlap().item() == pytest.approx(
        sum(3 / i for i in range(4, T)) / (T - 4)  # the first place is taken, three are left for the other i
    )


def test_top_weights_share_the_last_places():
    seen = torch.ones(1, 5, dtype=torch.bool)
    assert top_weights(torch.tensor([[[5.0, 1, 3, 1, 1]]]), seen, 3).tolist() == [
        [[1, *[pytest.approx(1 / 3)], 1, *[pytest.approx(1 / 3)] * 2]]
    ]
    seen = torch.tensor([[True, True, True, False, False]])
    assert top_weights(torch.zeros(1, 1, 5), seen, 2)[0, 0].tolist() == [pytest.approx(2 / 3)] * 3 + [0, 0]


def test_frobenius_takes_the_best_scale_out():
    A, M = random_matrix(seed=1), random_matrix(seed=2) + random_matrix(seed=1)
    found = comparison(M, A).frobenius()
    for h in range(3):
        m, a = M[h].double(), A[h].double()
        best = min(((a - s * m).norm() / a.norm()).item() for s in torch.linspace(0, 2, 4001).tolist())
        assert found[h].item() == pytest.approx(best, rel=1e-5)
    assert comparison(3 * A, A).frobenius().max() < 1e-7
    assert comparison(-A, A).frobenius().tolist() == [1, 1, 1]  # no scale below zero


def test_row_cosine_is_the_mean_over_rows():
    A, M = random_matrix(seed=1), random_matrix(seed=2)
    expected = torch.nn.functional.cosine_similarity(M.double(), A.double(), dim=-1).mean(-1)
    torch.testing.assert_close(comparison(M, A).row_cosine(), expected)


@pytest.mark.parametrize("block", [1, 5, 16, 23])
def test_blocks_of_rows_do_not_change_anything(block):
    M, A = random_matrix(seed=1), random_matrix(seed=2)
    for name in ("entropy", "memory_length", "mass"):
        torch.testing.assert_close(
            getattr(profile(M, block), name)(), getattr(profile(M), name)(), rtol=1e-12, atol=1e-12
        )
    assert profile(M, block).diversity() == pytest.approx(profile(M).diversity(), rel=1e-12)
    for name in ("overlap", "frobenius", "row_cosine"):
        whole, parts = comparison(M, A), comparison(M, A, block=block)
        torch.testing.assert_close(getattr(parts, name)(), getattr(whole, name)(), rtol=1e-12, atol=1e-12)
        assert parts.chance() == pytest.approx(whole.chance())


# ---------------------------------------------------------------------- of states


def test_cka_is_the_definition_by_kernels():
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(30, 5, generator=generator) @ torch.randn(5, 5, generator=generator) + 4 for _ in range(2))
    found = Likeness(5, CPU)
    for x, y in zip(X.split(7), Y.split(7), strict=True):
        found.add(x, y)
    X, Y = (Z.double() - Z.double().mean(0) for Z in (X, Y))
    K, L = X @ X.T, Y @ Y.T
    assert found.cka() == pytest.approx(((K * L).sum() / (K * K).sum().sqrt() / (L * L).sum().sqrt()).item(), rel=1e-9)
    assert 0.05 < found.cka() < 0.95


def test_cka_does_not_see_rotations_and_the_cosine_does():
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(200, 6, generator=generator).double()
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    found = Likeness(6, CPU)
    found.add(X, 3 * X @ turn + 1)
    assert found.cka() == pytest.approx(1, abs=1e-9)
    assert abs(found.cosine()) < 0.8
    other = Likeness(6, CPU)
    other.add(X, torch.randn(200, 6, generator=generator))
    assert other.cka() < 0.3


# ---------------------------------------------------------------------- of models


@pytest.fixture(scope="module")
def made():
    return previous_and_uniform()


@pytest.fixture(scope="module")
def rows():
    return torch.randint(3, 40, (2, T), generator=torch.Generator().manual_seed(5))


def of_head(found, metric: str, head: int) -> list[float]:
    return [row.value for row in select(found, metric=metric, head=head)]


def test_heads_of_a_made_model(made, rows):
    found = profile_rows(made, rows)
    assert of_head(found, "mass_1", PREVIOUS) == pytest.approx([1, 1], abs=1e-6)
    assert of_head(found, "memory_length", PREVIOUS) == pytest.approx([1.5, 1.5], abs=1e-5)
    assert of_head(found, "entropy", PREVIOUS) == pytest.approx([0, 0], abs=1e-4)
    expected = sum(math.log(i + 1) for i in range(T)) / T
    assert of_head(found, "entropy", UNIFORM) == pytest.approx([expected] * 2, rel=1e-5)
    assert one(found, metric="entropy", layer=None, head=None).value == pytest.approx(expected / 2, rel=1e-4)
    assert one(found, metric="diversity", layer=1).value == pytest.approx(profile(made_heads()).diversity(), rel=1e-4)
    assert {row.n for row in found} == {2 * T}


def test_what_is_drawn_are_the_matrices(made, rows):
    student = subquad.linearize(made, "retnet", calibration=TEXT)
    M, A = matrices_beside(student, made, rows[0], 1)
    torch.testing.assert_close(A, made_heads(), atol=1e-5, rtol=1e-5)
    assert M.shape == A.shape
    with pytest.raises(UserError, match="layer: got 2, expected 0 to 1"):
        matrices_beside(student, made, rows[0], 2)


PLANS = {
    "mistral": {"default": "gla", "1": "attention"},
    "qwen3": {"default": "xlstm", "0": {"mixer": "attention", "window": 5, "sinks": 2}},
    "wide-biased-tied": {"default": "gated_deltanet"},
}


@pytest.mark.parametrize("family", PLANS)
@pytest.mark.parametrize("side", ["teacher", "student"])
def test_a_model_compared_with_itself(make_teacher, rows, family, side):
    model = make_teacher(family)
    if side == "student":
        model = subquad.linearize(model, layers=PLANS[family], calibration=TEXT)
    found = diagnostics_rows(model, rows, model, top=4)
    assert {row.value for row in select(found, metric="overlap")} == {1}
    assert {row.value for row in select(found, metric="frobenius")} == {0}
    assert {row.value for row in select(found, metric="cka")} == {1}
    for metric, value in (("row_cosine", 1), ("cosine", 1), ("mixer_error", 0), ("layer_error", 0), ("swap_kl", 0)):
        assert [row.value for row in select(found, metric=metric)] == pytest.approx(
            [value] * len(select(found, metric=metric)), abs=1e-6
        )
        assert select(found, metric=metric)


@pytest.mark.parametrize("family", PLANS)
def test_a_student_differs_from_its_teacher(make_teacher, rows, family):
    teacher = make_teacher(family)
    student = subquad.linearize(teacher, layers=PLANS[family], calibration=TEXT)
    found = diagnostics_rows(student, rows, teacher, top=4)
    back = diagnostics_rows(teacher, rows, student, top=4)  # either may stand on either side
    for metric, worse in (("overlap", 0.99), ("cka", 0.9999), ("row_cosine", 0.99)):
        assert one(found, metric=metric, layer=None, head=None).value < worse
        assert one(back, metric=metric, layer=None, head=None).value < worse
    for metric in ("frobenius", "mixer_error", "layer_error", "swap_kl"):
        assert one(found, metric=metric, layer=None, head=None).value > 1e-3
    assert one(back, metric="cka", layer=0).value == pytest.approx(one(found, metric="cka", layer=0).value)


@pytest.mark.parametrize("mixer", ["gla", "deltanet", "gated_deltanet", "mamba2", "xlstm", "metala"])
def test_blocks_of_rows_are_rows_of_the_whole(make_teacher, mixer):
    teacher = make_teacher("qwen2")
    student = subquad.linearize(teacher, mixer, calibration=TEXT)
    ids = torch.randint(3, 61, (1, 75), generator=torch.Generator().manual_seed(1))
    whole = comparison_rows(student, teacher, ids) + profile_rows(student, ids)
    for block in (1, 7, 64):
        parts = comparison_rows(student, teacher, ids, block=block) + profile_rows(student, ids, block)
        assert [(r.metric, r.layer, r.head) for r in parts] == [(r.metric, r.layer, r.head) for r in whole]
        assert [r.value for r in parts] == pytest.approx([r.value for r in whole], rel=2e-4, abs=2e-4)


def test_kept_attention_overlaps_and_a_mixer_does_not(make_teacher, rows):
    teacher = make_teacher()
    student = subquad.linearize(teacher, layers={"default": "gla", "0": "attention"}, calibration=TEXT)
    found = comparison_rows(student, teacher, rows, top=4)
    assert one(found, metric="overlap", layer=0, head=None).value == 1
    assert one(found, metric="overlap", layer=1, head=None).value < 0.95


def test_an_untrained_student_overlaps_less_than_one_that_was_copied():
    nano, tokenizer = subquad.load_teacher("nano")
    text = "import os\n\n\ndef names(path):\n    return [name for name in os.listdir(path) if name]\n\n\n" * 3
    ids = torch.tensor([tokenizer(text).input_ids[:96]])
    values = {}
    for copy_qkv in (False, True):
        student = subquad.linearize(nano, "gated_deltanet", copy_qkv=copy_qkv, calibration=ids)
        found = comparison_rows(student, nano, ids) + state_rows(student, nano, ids)
        values[copy_qkv] = [one(found, metric=m, layer=None, head=None).value for m in ("overlap", "cka")]
    assert values[False][0] < values[True][0] < 0.9
    assert values[False][1] < values[True][1] < 0.999


# ---------------------------------------------------------------------- decays


@pytest.mark.parametrize("mixer", ["mamba2", "gla", "gated_deltanet", "kda", "xlstm"])
def test_half_life_is_what_it_was_set_to(teacher, rows, mixer):
    student = subquad.linearize(teacher, mixer, half_life=12.0, calibration=TEXT)
    if mixer != "xlstm":  # a bias in the gate's projection or its input moves no fresh student: its weights are zero
        torch.testing.assert_close(
            half_lives(student, rows)[1].float(),
            torch.full_like(half_lives(student, rows)[1].float(), 12.0),
            rtol=1e-4,
            atol=0,
        )
    found = half_life_rows(student, rows)
    assert one(found, layer=0, head=2).value == pytest.approx(12, rel=1e-4)
    assert one(found, layer=None).value == pytest.approx(12, rel=1e-4)


def test_half_lives_of_retnet_and_of_spread_channels(teacher, rows):
    retnet = half_lives(subquad.linearize(teacher, "retnet", calibration=TEXT), rows)[0]
    expected = [math.log(2) / -math.log1p(-(2.0 ** (-5 - h))) for h in range(4)]
    assert retnet.tolist() == pytest.approx(expected, rel=1e-5)
    metala = half_lives(subquad.linearize(teacher, "metala", calibration=TEXT), rows)[0]
    assert metala.shape == (4, 8)
    assert metala[1, [0, -1]].tolist() == pytest.approx([1, 256], rel=1e-3)


def test_half_life_is_of_the_mean_log_decay(teacher, rows):
    student = subquad.linearize(teacher, "gla", calibration=TEXT)
    with torch.no_grad():
        student.blocks[0].mixer.decay_up.weight.normal_(std=2.0, generator=torch.Generator().manual_seed(0))
    decays = []
    with torch.no_grad():
        hook = student.blocks[0].mixer.register_forward_pre_hook(
            lambda mixer, args: decays.append(mixer.log_decay(args[0]))
        )
        for ids in rows:
            student(ids[None], use_cache=False)
        hook.remove()
    mean = torch.cat(decays, dim=1).double().mean((0, 1))
    torch.testing.assert_close(half_lives(student, rows)[0], -math.log(2) / mean)
    assert decays[0].std() > 0.01


def test_mixers_without_decay_have_no_half_life(teacher, rows):
    assert half_life_rows(subquad.linearize(teacher, "deltanet", calibration=TEXT), rows) == []
    assert half_life_rows(teacher, rows) == []
    hybrid = subquad.linearize(teacher, layers={"default": "gla", "1": "attention"}, calibration=TEXT)
    assert [r.layer for r in half_life_rows(hybrid, rows)] == [None, *[0] * 5]


# ---------------------------------------------------------------------- where errors arise


def test_the_error_arises_where_it_was_put(teacher, rows):
    student = subquad.linearize(teacher, layers={"default": "attention", "1": "gla"}, calibration=TEXT)
    found = origin_rows(student, teacher, rows)
    for metric in ("mixer_error", "layer_error", "swap_kl"):
        assert abs(one(found, metric=metric, layer=0).value) < 1e-6
        assert one(found, metric=metric, layer=1).value > 1e-2
        mean = one(found, metric=metric, layer=None).value
        assert mean == pytest.approx(one(found, metric=metric, layer=1).value / 2, rel=1e-3)
    # with nothing else to differ in, the teacher with that layer is the student
    whole = compare(student, teacher, [rows])
    assert one(found, metric="swap_kl", layer=1).value == pytest.approx(whole["kl"], rel=1e-4)
    rise = whole["loss"] - whole["teacher_loss"]
    assert one(found, metric="swap_loss", layer=1).value == pytest.approx(rise, rel=1e-3, abs=1e-6)


def test_a_mixer_that_says_nothing_has_an_error_of_one(teacher, rows):
    student = subquad.linearize(teacher, "gla", calibration=TEXT)
    with torch.no_grad():
        student.blocks[0].mixer.o_proj.weight.zero_()
    found = error_rows(student, teacher, rows)
    assert one(found, metric="mixer_error", layer=0).value == 1
    assert one(found, metric="mixer_error", layer=1).value != pytest.approx(1, abs=1e-3)


def test_divergence_is_the_definition():
    p, q = torch.randn(2, 600, 7, generator=torch.Generator().manual_seed(0))
    target = torch.randint(7, (600,), generator=torch.Generator().manual_seed(1))
    P, Q = torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    kl, rise = divergence(p, q, target).tolist()
    assert kl == pytest.approx(torch.distributions.kl_divergence(P, Q).sum().item())
    assert rise == pytest.approx((P.log_prob(target) - Q.log_prob(target)).sum().item())


def everything(model) -> tuple:
    modules = {name: id(module) for name, module in model.named_modules()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules, hooks, {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()}


def test_models_are_as_they_were(make_teacher, rows):
    teacher = make_teacher("mistral").train()
    student = subquad.linearize(teacher, layers={"default": "gla", "1": "attention"}, calibration=TEXT)
    before = everything(teacher), everything(student)
    diagnostics_rows(student, rows, teacher, top=4)
    diagnostics_rows(teacher, rows, student, top=4)
    assert (everything(teacher), everything(student)) == before
    assert teacher.training
    assert student.training


def test_models_are_as_they_were_after_a_failure(teacher, rows):
    student = subquad.linearize(teacher, "gla", calibration=TEXT)
    before = everything(teacher), everything(student)
    ours, theirs = stacks(student, teacher)

    def fail() -> None:
        with ours.ours(), theirs.ours(), theirs.with_layer(1, ours):
            assert theirs.layers[1] is ours.layers[1]
            assert theirs.mixing[0] is theirs.blocks[0]
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert (everything(teacher), everything(student)) == before


def test_a_plain_model_gives_the_same_in_our_form(make_teacher, rows):
    for family in ("mistral", "plain"):
        model = make_teacher(family)
        with torch.no_grad():
            whole = model(rows, use_cache=False).logits
            with Stack(model).ours():
                again = model(rows, use_cache=False).logits
        torch.testing.assert_close(again, whole, rtol=1e-4, atol=1e-5)


def test_models_that_do_not_correspond_are_refused(make_teacher, rows):
    teacher = make_teacher()
    student = subquad.linearize(teacher, "gla", calibration=TEXT)
    with pytest.raises(UserError, match="the student has 2 layers, the teacher 3"):
        swap_rows(student, make_teacher(num_hidden_layers=3), rows)
    with pytest.raises(UserError, match="layer 0 has 4 heads over 32 channels, the teacher's 2 over 32"):
        state_rows(student, make_teacher(num_attention_heads=2), rows)
    with pytest.raises(UserError, match="top: got 24 for texts of 24 tokens, expected 1 to 23"):
        comparison_rows(student, teacher, rows, top=24)
    with pytest.raises(UserError, match="texts of 1 token, expected at least 2"):
        state_rows(student, teacher, rows[:, :1])


# ---------------------------------------------------------------------- memory

PROGRAM = """
import sys
sys.modules["fla"] = None
import torch, subquad
from subquad.evaluate.diagnostics import comparison_rows, profile_rows
from subquad.ops.bench import peak_rss
torch.set_num_threads(1)
nano, _ = subquad.load_teacher("nano")
nano.model.layers, nano.config.num_hidden_layers = nano.model.layers[:1], 1
student = subquad.linearize(nano, sys.argv[1], calibration=torch.arange(12)[None])
ids = torch.randint(3, 4000, (1, 4096))
found = comparison_rows(student, nano, ids) + profile_rows(student, ids)
assert all(0 <= row.value < 4096 for row in found)
print(peak_rss())
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [pytest.param("gla", marks=pytest.mark.sample), "gated_deltanet"])
def test_4096_tokens_fit_in_4_gigabytes(mixer):
    """Whole, in float64, one matrix of six heads has 805 MB, and the comparison holds a dozen."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, mixer], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    peak = int(done.stdout.split()[-1])
    print(f"{mixer}: {peak / 1e9:.2f} GB")
    assert peak < 4e9
