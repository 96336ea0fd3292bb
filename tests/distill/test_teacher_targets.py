"""Sparse targets of stage 3: their loss against its definition, their expectation, and the cache on disk."""

import shutil
import threading

import pytest
import torch
from torch import Tensor

import subquad
from subquad.config import EndToEndStage
from subquad.distill import target_cache
from subquad.distill.distillation_loss import distillation_loss
from subquad.distill.end_to_end import EndToEndDistillation
from subquad.distill.lm_head import Head
from subquad.distill.objective import collate
from subquad.distill.target_cache import TargetCache, row_keys
from subquad.distill.teacher_targets import SparseTargets, draw, largest
from subquad.utils import UserError

N, D, V, SIZE = 7, 6, 19, 5
HEADS = {"plain": {}, "everything": {"bias": True, "scale": 1.7, "softcap": 2.0}}


def stage(method="sampled", **options):
    return EndToEndStage(tokens=1, lr=1.0, teacher_targets=method, **options)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparse(reduction, size=SIZE) -> SparseTargets:
    """The form in which the cache gives a reduction of its positions."""
    ids, weights, counts, outside, entropy = reduction
    padded = torch.zeros(2, len(counts), int(counts.max()), dtype=torch.float64)
    present = torch.arange(padded.shape[2]) < counts[:, None]
    padded[0] = ids[(counts.cumsum(0) - counts)][:, None]
    padded[0][present], padded[1][present] = ids.double(), weights.double()
    return SparseTargets(padded[0].long(), padded[1] / (size if outside is None else 1), outside, entropy)


def uniform(n=N, seed=0):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.0, 0.7)], ids=str)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("reduce", [draw, largest])
def test_loss_equals_its_definition(reduce, kind, weights):
    """Value and gradients by autograd through full logits, in float64; several chunks, ignored tokens."""
    options = dict(HEADS[kind])
    bias = random(V, seed=3).requires_grad_() if options.pop("bias", False) else None
    hidden, head = random(N, D, seed=1).requires_grad_(), Head(random(V, D, seed=2).requires_grad_(), bias, **options)
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(4))
    labels[2] = -100
    p = (2 * random(N, V)).softmax(-1)[labels != -100]
    targets = sparse(reduce(p.log(), SIZE, uniform(len(p))))
    given = stage(ce_weight=weights[0], kl_weight=weights[1])
    found = distillation_loss(hidden, targets, labels, head, None, given, chunk=4)

    log_q = head.logits(hidden)[labels != -100].log_softmax(-1)
    ce = -log_q.gather(1, labels[labels != -100][:, None]).mean()
    if reduce is draw:
        kl = -(targets.weights * log_q.gather(1, targets.ids)).sum(-1) + (p * p.log()).sum(-1)
    else:
        top, ids = p.topk(SIZE)
        own, rest = log_q.exp().gather(1, ids), 1 - top.sum(-1)
        kl = (top * (top / own).log()).sum(-1) + rest * (rest / (1 - own.sum(-1))).log()
        assert (kl > 0).all()
        assert (kl < (p * (p.log() - log_q)).sum(-1)).all()
    expected = weights[0] * ce + weights[1] * kl.mean(), ce, kl.mean()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
    inputs = [x for x in (hidden, head.weight, bias) if x is not None]
    gradients = zip(*(torch.autograd.grad(x[0], inputs) for x in (found, expected)), strict=True)
    for a, b in gradients:
        torch.testing.assert_close(a, b)


def test_all_probabilities_give_the_full_loss():
    hidden, teacher = random(N, V).requires_grad_(), random(N, V, seed=1)
    labels = torch.arange(N)
    full, reduced = (
        distillation_loss(hidden, targets, labels, None, None, stage(method))
        for method, targets in (("full", teacher), ("top_k", sparse(largest(teacher, V, uniform()))))
    )
    torch.testing.assert_close(full, reduced)
    torch.testing.assert_close(*(torch.autograd.grad(loss[0], hidden)[0] for loss in (full, reduced)))


def test_gradient_of_the_largest_probabilities_is_zero_for_the_teacher_itself():
    logits = 3 * random(N, V)
    value, grad = sparse(largest(logits, 3, uniform())).divergence(logits.log_softmax(-1), logits.softmax(-1))
    assert value.abs().max() < 1e-12
    assert grad.abs().max() < 1e-12


def test_draws_are_unbiased():
    """Means over many draws of one position are within 4 standard errors of the full value and gradient, and the errors
    are small enough to see a bias of a tenth of a draw. Independent draws have more variance."""
    count, size = 20_000, 4
    p, log_q = (1.5 * random(1, V)).softmax(-1), (1.5 * random(1, V, seed=1)).log_softmax(-1)
    targets = sparse(draw(p.log().expand(count, V), size, uniform(count)), size)
    value, grad = targets.divergence(log_q.expand(count, V), log_q.exp().expand(count, V))
    full = torch.cat([log_q.exp() - p, (p * (p.log() - log_q)).sum(-1, keepdim=True)], 1)
    found = torch.cat([grad, value[:, None]], 1)
    errors = found.std(0) / count**0.5
    assert ((found.mean(0) - full[0]).abs() <= 4 * errors).all()
    assert errors[:-1].max() < 0.1 / size / 10
    independent = (p * (1 - p) / size).sum()
    assert found[:, :-1].var(0).sum() < 0.6 * independent


def test_draws_are_shares_of_the_size_and_never_impossible_tokens():
    logits = 2 * random(N, V)
    logits[:, [0, 7, V - 1]] = -torch.inf
    counts = SIZE * torch.zeros(N, V).double()
    targets = sparse(draw(logits, SIZE, uniform()))
    counts.scatter_add_(1, targets.ids, SIZE * targets.weights)
    assert counts.sum(1).tolist() == pytest.approx([SIZE] * N)
    assert (counts - SIZE * logits.softmax(-1)).abs().max() < 1
    assert counts[:, [0, 7, V - 1]].sum() == 0


# ---------------------------------------------------------------------- the cache


LENGTH = 10


class CountingTeacher:
    """Counts the rows of text that go through a teacher; `limit`: fails after so many."""

    def __init__(self, model, limit=None):
        self.rows, self.limit = 0, limit
        self.hook = model.base_model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs):
        ids = kwargs["input_ids"]
        self.rows += len(ids) if ids.shape[1] == LENGTH else 0  # else `read_head`
        if self.limit is not None and self.rows > self.limit:
            raise KeyboardInterrupt


@pytest.fixture
def directory(monkeypatch, tmp_path):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path))
    monkeypatch.setattr(target_cache, "PART_TOKENS", 40)
    monkeypatch.setattr(target_cache, "PASS_TOKENS", 20)
    return tmp_path / "targets"


def text_rows(count=10, length=LENGTH) -> list[dict[str, Tensor]]:
    """Rows of two documents, where some tokens have no loss."""
    ids = torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(ids % 7 == 0, -100)
    positions = torch.cat([torch.arange(4), torch.arange(length - 4)])
    return [{"input_ids": i, "labels": y, "position_ids": positions} for i, y in zip(ids, labels, strict=True)]


def objective(teacher, method="top_k", size=61, **options):
    found = EndToEndDistillation(teacher, stage(method, target_size=size, **options))
    assert found.teacher_head is not None  # read now, not in a thread and not where the teacher fails
    return found


def files(directory):
    return sorted(directory.glob("*/*.arrow"))


def loss_and_gradient(objective, student, rows):
    student.zero_grad()
    loss = student(objective=objective, **objective.forward_kwargs(collate(rows))).loss
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])


def test_rows_are_found_in_any_order_without_the_teacher(teacher, directory):
    """With the whole vocabulary the loss is the full one, up to the rounding of float16."""
    rows, student = text_rows(), subquad.linearize(teacher, "gla")
    expected = loss_and_gradient(objective(teacher, "full"), student, rows[:4])
    counter = CountingTeacher(teacher)
    objective(teacher).prepare([*rows, *rows[:3]])
    assert counter.rows == len(rows)
    again = objective(teacher)
    again.prepare(rows[::-1])
    counter.hook.remove()
    teacher.base_model.forward = None
    found = loss_and_gradient(again, student, [rows[i] for i in (2, 0, 3, 1)])
    assert float(found[0]) == pytest.approx(float(expected[0]), rel=1e-4)
    assert (found[1] - expected[1]).norm() < 1e-3 * expected[1].norm()


def test_draws_depend_on_the_row_alone(teacher, directory):
    rows = text_rows()
    some, all_rows = (objective(teacher, "sampled", 8) for _ in range(2))
    some.prepare(rows[5:7])
    found = some.target_cache(collate(rows[5:6]))
    shutil.rmtree(directory)
    all_rows.prepare(rows)
    again = all_rows.target_cache(collate(rows[5:6]))
    torch.testing.assert_close(found.ids, again.ids)
    torch.testing.assert_close(found.weights, again.weights)
    other = objective(teacher, "sampled", 9)
    other.prepare(rows[:1])
    assert len({path.parent for path in files(directory)}) == 2


def test_targets_follow_labels_and_documents(teacher, directory):
    rows = text_rows(2)
    cached = objective(teacher, size=1)
    plain = [{**row, "position_ids": torch.arange(10)} for row in rows]
    cached.prepare([*rows, *plain])
    assert len(cached.target_rows) == 4
    inputs = {name: rows[0][name][None] for name in ("input_ids", "position_ids")}
    logits = teacher(**inputs, use_cache=False).logits[0]
    counted = torch.nn.functional.pad(rows[0]["labels"][1:], (0, 1), value=-100) != -100
    found = cached.target_cache(collate(rows[:1]))
    torch.testing.assert_close(found.ids, logits[counted].argmax(-1)[:, None])
    assert len(found.ids) < 9
    torch.testing.assert_close(found.weights[:, 0] + found.outside, torch.ones(len(found.ids)))
    # a batch has positions only where one of its rows has several documents
    alone = {name: x for name, x in plain[1].items() if name != "position_ids"}
    assert row_keys(collate([alone])) == row_keys(collate([rows[0], plain[1]]))[1:]


def test_a_killed_pass_continues_and_damaged_files_are_computed_again(teacher, directory, caplog):
    rows = text_rows()
    killed = CountingTeacher(teacher, limit=6)
    with pytest.raises(KeyboardInterrupt):
        objective(teacher).prepare(rows)
    killed.hook.remove()
    assert len(files(directory)) == 1
    rest = CountingTeacher(teacher)
    objective(teacher).prepare(rows)
    assert rest.rows == len(rows) - 4
    path = files(directory)[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    rest.rows = 0
    objective(teacher).prepare(rows)
    assert "is damaged" in caplog.text
    assert 0 < rest.rows <= 4
    assert len(files(directory)) == 3
    assert not [*directory.glob("*/*.part")]


def test_of_two_that_fill_a_cache_one_writes(teacher, directory):
    rows, first, second = text_rows(), objective(teacher), objective(teacher)
    started = threading.Event()
    other = threading.Thread(target=lambda: (started.set(), second.prepare(rows)))
    counter = CountingTeacher(teacher)

    def start_other(*_):
        if not other.is_alive() and not started.is_set():
            other.start()
            other.join(0.2)

    hook = teacher.base_model.register_forward_hook(start_other)
    first.prepare(rows)
    other.join()
    hook.remove()
    assert counter.rows == len(rows)
    assert second.target_cache.rows.keys() == first.target_cache.rows.keys()


def test_cache_of_other_weights_or_dtypes_is_another(teacher, directory):
    def place(method="sampled", size=8):
        return TargetCache(teacher, None, stage(method, target_size=size)).directory

    found = [place(), place("top_k"), place(size=9)]
    with torch.autocast("cpu", torch.bfloat16):
        found.append(place())
    teacher.get_input_embeddings().weight.data[0, 0] += 1
    found.append(place())
    assert len(set(found)) == 5
    assert place() == found[-1]


def test_teachers_with_undefined_logits_are_refused(teacher, directory):
    cached = objective(teacher)
    teacher.get_output_embeddings().weight.data[0, 0] = torch.nan
    with pytest.raises(UserError, match="logits are not finite"):
        cached.prepare(text_rows())
