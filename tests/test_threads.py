"""Warnings about threads that lack cores."""

import logging

import pytest

from subquad import threads
from subquad.threads import ThreadWatch


@pytest.fixture
def watch(monkeypatch, caplog):
    """`look` an interval later, at a count of work, with nanoseconds of running and waiting since the last look."""
    caplog.set_level(logging.WARNING, "subquad")
    monkeypatch.setattr(ThreadWatch, "warned", False)
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    now = [0.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: now[0])
    times = [0, 0]
    monkeypatch.setattr(threads, "scheduled", lambda: tuple(times))
    made = ThreadWatch(4)

    def look(count, ran, waited, seconds=threads.INTERVAL):
        now[0] += seconds
        times[0] += ran
        times[1] += waited
        made.look(count)

    return look


def test_threads_that_wait_for_cores_are_reported_once(watch, caplog):
    watch(100, 90, 10)
    assert caplog.messages == []
    watch(150, 0, 40, seconds=1)  # too early to look
    assert caplog.messages == []
    watch(300, 50, 10)
    text = "other processes use the cores too: 4 threads wait 50% of the time for a core; "
    assert caplog.messages == [text + "set OMP_NUM_THREADS (docs/scale.md) to 2"]
    watch(400, 50, 50)
    assert len(caplog.messages) == 1


def test_a_fallen_speed_is_reported(watch, caplog):
    watch(100, 100, 0)
    watch(190, 100, 0)
    assert caplog.messages == []
    watch(230, 100, 0)
    assert caplog.messages[0].startswith("the speed has fallen to 40% of that of the first minute; ")


def test_more_threads_than_cores_are_reported_at_once(monkeypatch, caplog):
    monkeypatch.setattr(ThreadWatch, "warned", False)
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    ThreadWatch(8)
    assert caplog.messages == ["8 threads on 4 cores: set OMP_NUM_THREADS (docs/scale.md) to at most 4"]


def test_without_scheduling_times_the_load_counts(monkeypatch):
    monkeypatch.setattr(threads, "available_cores", lambda: 4)
    monkeypatch.setattr(threads, "scheduled", lambda: None)
    for load, expected in ((4.9, 0.0), (8.0, 0.5)):
        monkeypatch.setattr(threads.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert ThreadWatch(4).waiting_share() == expected


def test_scheduled_times_grow():
    found = threads.scheduled()
    if found is None:
        pytest.skip("this system does not tell")
    sum(range(5_000_000))
    assert threads.scheduled()[0] > found[0]


def test_available_cores_are_at_least_one():
    assert threads.available_cores() >= 1
