"""Scratch memory is reused and its stale views are not; a few rows of a long matrix need little memory."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from subquad import ops
from subquad.ops.engine.workspace import MAX_VIEWS, Workspace
from tests.helpers.ops import VARIANTS, differentiate, draw

updates = pytest.mark.parametrize("delta", [False, True], ids=["additive", "delta"])
ROWS_OF_A_LONG_MATRIX = """
import sys
sys.path[:0] = ["tests/ops"]
import torch
from tests.helpers.ops import VARIANTS, draw
from subquad import ops
from benchmarks.common import peak_rss

def run(T):
    for variant in VARIANTS:
        case = {n: x.float() for n, x in draw(variant, T=T, H=4, state=False).items() if x is not None and n != "v"}
        with torch.no_grad():
            assert ops.matrix(**case, rows=slice(T - 128, T)).shape == (1, 4, 128, T)

run(256)
before = peak_rss()
run(4096)
print(peak_rss() - before)
"""


def workspace():
    """A workspace of a dtype that no operator uses."""
    return Workspace(torch.empty(0), torch.complex128)


def test_buffers_are_reused_and_grow():
    work = workspace()
    small = work("x", 2, 3)
    assert work("x", 2, 3) is small
    assert workspace()("x", 3, 2).data_ptr() == small.data_ptr(), "another call of the same thread"
    large = work("x", 100)
    assert work("x", 2, 3).data_ptr() == large.data_ptr() != small.data_ptr()


def test_cached_views_are_recreated_when_their_buffer_grows():
    work = workspace()

    def make():
        return [work("y", n) for n in (5, 50)]  # the second request moves the buffer of the first

    first = work.cached_view("views", make)
    assert work.cached_view("views", make) is first
    assert first[0].data_ptr() == first[1].data_ptr()
    moved = work("y", 500)
    again = work.cached_view("views", make)
    assert {x.data_ptr() for x in again} == {moved.data_ptr()}


def test_number_of_cached_views_is_bounded():
    work = workspace()
    for n in range(2 * MAX_VIEWS):
        work.cached_view(("number", n), lambda n=n: n + 1)
    assert len(work.views) <= MAX_VIEWS


def held_bytes() -> int:
    """Bytes of the buffers of this thread in float32, on the CPU."""
    return sum(buffer.nbytes for buffer in Workspace(torch.empty(0), torch.float32).buffers.values())


@updates
def test_buffers_of_a_large_call_are_released(delta):
    """A matrix of a chunk of 2,048 tokens has 16.8 MB; a call holds several."""
    case = {n: x.float() for n, x in draw(("scalar", delta), B=1, T=2048, H=1, state=False).items() if x is not None}
    case = {name: x.requires_grad_() for name, x in case.items()}
    o, _ = ops.chunk(**case, chunk_size=2048)
    assert held_bytes() <= 2**25
    o.sum().backward()
    assert held_bytes() <= 2**25


def test_buffers_of_a_large_convolution_are_released():
    x, weight = torch.zeros(64, 40, 8192, requires_grad=True), torch.zeros(8192, 4, requires_grad=True)
    ops.short_conv(x, weight)[0].sum().backward()
    assert held_bytes() <= 2**25


def test_buffers_of_a_usual_call_are_kept():
    case = {n: x.float() for n, x in draw(("channel", True), B=1, T=512, H=4, K=64, V=64).items()}
    ops.chunk(**case)
    held = held_bytes()
    assert 2**23 < held <= 2**25
    ops.chunk(**case)
    assert held_bytes() == held


@updates
def test_results_do_not_depend_on_the_order_of_sizes(delta):
    variants = [variant for variant in VARIANTS if variant[1] == delta]
    cases = [
        draw(variant, B=B, T=T, K=K, V=K) for variant in variants for B, T, K in [(1, 40, 8), (2, 130, 16), (1, 300, 8)]
    ]
    first = [differentiate(ops.chunk, case, torch.float32) for case in cases]
    for case, before in reversed(list(zip(cases, first, strict=True))):
        again = differentiate(ops.chunk, case, torch.float32)
        assert all(torch.equal(again[name], before[name]) for name in before)


def test_training_after_a_call_in_inference_mode():
    x, weight = torch.randn(1, 40, 4), torch.randn(4, 4, requires_grad=True)
    with torch.inference_mode():
        expected, _ = ops.short_conv(x, weight)
    found, _ = ops.short_conv(x, weight)
    found.sum().backward()
    torch.testing.assert_close(found, expected)


def test_threads_do_not_share_scratch_memory():
    cases = [draw(("channel", True), T=200, seed=seed) for seed in range(2)]
    sequential = [differentiate(ops.chunk, case, torch.float32) for case in cases]
    wrong = []

    def work(n):
        for _ in range(5):
            got = differentiate(ops.chunk, cases[n], torch.float32)
            wrong.extend(name for name in got if not torch.equal(got[name], sequential[n][name]))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, range(2)))
    assert not wrong


@pytest.mark.slow
@pytest.mark.sample
def test_rows_of_a_long_matrix_fit_in_memory():
    """The full matrix takes 268 MB, 128 rows take 8 MB."""
    result = subprocess.run([sys.executable, "-c", ROWS_OF_A_LONG_MATRIX], capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100e6
