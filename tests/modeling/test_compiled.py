"""`generate(..., compile_config=...)`: the decode step of students without attention as one compiled graph."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import CompileConfig

import subquad
from subquad.modeling.compiled import copied
from tests.helpers.students import MIXERS, all_close, in_pieces, logits, make_student

GREEDY = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
ONE_GRAPH = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch.compiler.reset()
    counters.clear()


def check_tokens_and_graphs(student, ids, graphs, **inputs):
    eager = student.generate(ids, max_new_tokens=8, **GREEDY, **inputs)
    compiled = student.generate(ids, max_new_tokens=8, compile_config=ONE_GRAPH, **GREEDY, **inputs)
    assert compiled.tolist() == eager.tolist()
    assert counters["stats"]["unique_graphs"] == graphs
    longer = student.generate(ids, max_new_tokens=16, compile_config=ONE_GRAPH, **GREEDY, **inputs)
    assert longer[:, : eager.shape[1]].tolist() == eager.tolist()
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.sample
@pytest.mark.parametrize("mixer", MIXERS)
def test_nano_generates_the_same_tokens_with_one_graph(mixer, nano):
    student = subquad.linearize(copy.deepcopy(nano[0]), mixer)
    check_tokens_and_graphs(student, torch.arange(50, 62)[None], graphs=1)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="the default backend needs a C++ compiler")
def test_the_default_backend_gives_the_same_logits(teacher, ids):
    student = make_student(teacher, "gated_deltanet")
    step, cache = student.get_compiled_call(), student.new_cache()
    with torch.no_grad():
        got = [step(piece, past_key_values=cache).logits for piece in ids.split([4, *[1] * 7], dim=1)]
    assert all_close(torch.cat(got, 1), in_pieces(student, ids, [4, *[1] * 7]))
    assert counters["stats"]["unique_graphs"] == 1


def test_batches_with_padding_and_without_take_one_graph_each(teacher, ids):
    student = make_student(teacher, "gated_deltanet")
    check_tokens_and_graphs(student, ids, graphs=1)
    mask = torch.ones_like(ids).index_fill(1, torch.arange(3), 0)
    mask[0] = 1
    check_tokens_and_graphs(student, ids, graphs=2, attention_mask=mask)
    copy.deepcopy(student)


def test_copied_states_share_no_memory():
    states = (torch.randn(2, 3), torch.arange(4)), (), (torch.randn(1, 2).bfloat16(),)
    copies = copied(states)
    for before, after in zip(states, copies, strict=True):
        for x, y in zip(before, after, strict=True):
            assert torch.equal(x, y)
            assert x.dtype == y.dtype
            assert x.data_ptr() != y.data_ptr()


def test_calls_that_are_no_step_are_the_students_own(teacher, ids):
    student = make_student(teacher, "gla")
    step, cache = student.get_compiled_call(ONE_GRAPH), student.new_cache()
    with torch.no_grad():
        for piece in ids.split([4, 1, 6], dim=1):
            got = step(piece, output_hidden_states=True, past_key_values=cache)
    assert cache.get_seq_length() == ids.shape[1]
    assert got.hidden_states is not None
    torch.testing.assert_close(got.logits, logits(student, ids)[:, 5:])
    assert counters["stats"]["unique_graphs"] == 0


def test_another_configuration_compiles_anew(teacher):
    student = make_student(teacher, "gla")
    step = student.get_compiled_call(ONE_GRAPH)
    assert student.get_compiled_call(ONE_GRAPH) is step
    assert student.get_compiled_call(CompileConfig(backend="eager")) is not step


@pytest.mark.parametrize("layer", ["attention", {"mixer": "attention", "window": 4}])
def test_students_with_attention_are_refused(teacher, ids, layer):
    student = make_student(teacher, layer_types={"default": "gla", "1": layer})
    with pytest.raises(ValueError, match=r"compile_config: got a student with attention.*expected a cache of mixers"):
        student.generate(ids, max_new_tokens=2, compile_config=ONE_GRAPH, **GREEDY)
