"""Progress: a bar on a terminal, else lines in the log."""

import io
import logging
import sys

import pytest

from subquad import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """The time, in a list of one number."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_lines_come_at_intervals_with_speed_and_time_left(clock, caplog):
    caplog.set_level(logging.INFO, "subquad")
    with progress.bar(40_000, "gla hidden", "tok", initial=10_000) as bar:
        for seconds in (5, 4, 3, 20, 9, 1):
            clock[0] += seconds
            bar.set_postfix_str("loss 0.301", refresh=False)
            bar.update(1000)
    assert caplog.messages == [
        "gla hidden: 32% of 40.0k tok, loss 0.301, 250 tok/s, 0:01:48 left",
        "gla hidden: 40% of 40.0k tok, loss 0.301, 143 tok/s, 0:02:48 left",
    ]


def test_lines_without_a_total(clock, caplog):
    caplog.set_level(logging.INFO, "subquad")
    with progress.bar(None, "tokenizing", "tok") as bar:
        clock[0] += 20
        bar.update(4000)
    assert caplog.messages == ["tokenizing: 4.00k tok, 200 tok/s"]


def test_a_terminal_shows_a_bar_and_no_lines(monkeypatch, clock, caplog):
    caplog.set_level(logging.INFO, "subquad")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.bar(4, "calibrating", "layers") as bar:
        clock[0] += 60
        bar.update()
        bar.refresh()
    assert "calibrating:  25%" in screen.getvalue()
    assert caplog.messages == []


def test_hidden_progress_shows_nothing(monkeypatch, clock, caplog):
    caplog.set_level(logging.INFO, "subquad")
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress.hidden("bars", "lines"), progress.bar(4, "calibrating", "layers") as bar:
        clock[0] += 60
        bar.update()
        progress.announce("begins")
    assert (screen.getvalue(), caplog.messages) == ("", [])
    progress.announce("%s begins", "it")
    assert caplog.messages == ["it begins"]
