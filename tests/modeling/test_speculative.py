"""Speculative decoding: a student drafts for its teacher, or verifies what a draft or a prompt lookup proposes."""

import collections

import pytest
import torch

from tests.helpers.architectures import build_teacher
from tests.helpers.students import KINDS, make_student

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture(scope="module")
def teacher():
    return build_teacher("llama").eval()


@pytest.fixture(scope="module", params=KINDS)
def student(request, teacher):
    return make_student(build_teacher("llama"), layer_types=KINDS[request.param]).eval()


def prompts(count, length=9):
    return torch.randint(3, 61, (count, 1, length), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("schedule", ["constant", "heuristic"])
def test_drafts_leave_the_text_of_the_teacher(teacher, student, schedule):
    student.generation_config.num_assistant_tokens_schedule = schedule
    student.generation_config.num_assistant_tokens = 4
    for ids in prompts(20 if schedule == "constant" else 3):
        expected = teacher.generate(ids, max_new_tokens=20, **GREEDY)
        found = teacher.generate(ids, max_new_tokens=20, assistant_model=student, **GREEDY)
        assert torch.equal(found, expected)


def test_a_student_is_drafted_for(teacher, student):
    """By its teacher, by itself (all is accepted), and by prompt lookup."""
    for ids in prompts(3):
        ids = torch.cat((ids, ids), 1)  # so that a lookup finds something
        expected = student.generate(ids, max_new_tokens=20, **GREEDY)
        for given in ({"assistant_model": teacher}, {"assistant_model": student}, {"prompt_lookup_num_tokens": 3}):
            assert torch.equal(student.generate(ids, max_new_tokens=20, **GREEDY, **given), expected), given


def test_end_of_text_in_a_draft_ends_the_text(teacher, student):
    for ids in prompts(4):
        free = teacher.generate(ids, max_new_tokens=20, **GREEDY)[0, ids.shape[1] :].tolist()
        given = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": free[7], "pad_token_id": 0}
        expected = teacher.generate(ids, **given)
        assert torch.equal(teacher.generate(ids, assistant_model=student, **given), expected)


@pytest.mark.slow
@pytest.mark.sample
def test_sampled_drafts_keep_the_distribution_of_the_teacher(teacher):
    """Pairs of tokens, 3,000 draws each with and without drafts: a chi-squared test of both samples."""
    from scipy.stats import chi2_contingency

    student = make_student(build_teacher("llama"), layer_types=KINDS["pure"]).eval()
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.num_assistant_tokens = 2
    ids, draws = prompts(1)[0], 3000
    given = {"max_new_tokens": 3, "do_sample": True, "top_k": 4, "eos_token_id": None, "pad_token_id": 0}
    torch.manual_seed(0)
    plain = teacher.generate(ids.expand(draws, -1), **given)[:, -3:-1]
    drafted = torch.cat([teacher.generate(ids, assistant_model=student, **given)[:, -3:-1] for _ in range(draws)])
    counts = [collections.Counter(map(tuple, sample.tolist())) for sample in (plain, drafted)]
    assert len(counts[0]) > 8
    table = [[count[pair] for count in counts] for pair in counts[0] | counts[1]]
    assert chi2_contingency([row for row in table if sum(row) >= 10]).pvalue > 1e-3
