"""Pictures show the numbers that they were given, and are written the same every time."""

import pytest
import torch
from handmade import previous_matrix, uniform_matrix

from subquad.analysis.plots import FAINTEST, decay_figure, layers_figure, matrices_figure, recall_figure, save
from subquad.evaluate.results import Result
from subquad.utils import UserError

RECALL = [
    Result(task=task, metric="acc", value=length / 1000 + depth / 2, length=length, depth=depth)
    for task in ("needle_number", "induction")
    for length in (128, 256)
    for depth in (0.0, 0.5, 1.0)
]
COPY = [
    Result(task="copy", metric=metric, value=value, length=128) for metric, value in (("acc", 0.75), ("chance", 0.25))
]


def matrices():
    return matrices_figure({(0, 1): (3 * uniform_matrix(12), previous_matrix(12))}, "nano and a student")


def test_matrices_show_the_share_of_each_row():
    figure = matrices()
    teacher, student = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert teacher[5, 4] == 1
    assert teacher[5, 2] == FAINTEST
    assert student[7, 3] == pytest.approx(1 / 8)
    assert teacher.mask[3, 4]  # later tokens
    assert student.mask[3, 4]
    assert figure.axes[0].get_title() == "layer 0, head 1"
    assert figure.axes[0].get_ylabel().startswith("teacher")
    assert figure.axes[1].get_ylabel().startswith("student")
    assert figure.axes[1].get_xlabel() == "token attended to"


def test_decays_show_every_channel_and_the_median_of_each_head():
    layers = [torch.tensor([[1.0, 2, 4], [8, 8, 64]]), None, torch.tensor([16.0, 32.0])]
    (axes,) = decay_figure(layers, "decays").axes
    points = [line for line in axes.lines if line.get_marker() != "None" and len(line.get_xdata())]
    drawn = [list(line.get_ydata()) for line in points]
    assert drawn == [[1, 2, 4], [2], [8, 8, 64], [8], [16], [32]]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["a channel", "median of a head"]
    assert [round(float(line.get_xdata()[0])) for line in points] == [0, 0, 0, 0, 2, 2]
    assert axes.get_yscale() == "log"
    assert "tokens" in axes.get_ylabel()
    with pytest.raises(UserError, match="no layer has a decay"):
        decay_figure([None, None], "decays")


def test_recall_shows_a_cell_for_each_length_and_depth():
    figure = recall_figure(RECALL + COPY, "student")
    assert [axes.get_title() for axes in figure.axes[:3]] == ["needle_number", "induction", "copy"]
    image = figure.axes[0].images[0]
    assert image.get_array().shape == (3, 2)
    assert image.get_array()[2, 1] == pytest.approx(0.256 + 0.5)
    assert image.get_clim() == (0, 1)
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["128", "256"]
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["0", "0.5", "1"]
    assert figure.axes[2].images[0].get_array().tolist() == [[0.75]]
    assert "0.75" in [t.get_text() for t in figure.axes[2].texts]
    assert figure.axes[-1].get_ylabel() == "acc (chance: 0.25)"
    with pytest.raises(UserError, match="no rows with metric 'f1'"):
        recall_figure(RECALL, "student", metric="f1")


def test_a_metric_by_layer_is_a_line_a_model():
    rows = [Result(task="states", metric="cka", value=1 - i / 10, layer=i) for i in (2, 0, 1)]
    rows += [Result(task="states", metric="cka", value=0.5), Result(task="states", metric="cosine", value=0.1, layer=0)]
    figure = layers_figure({"gla": rows, "xlstm": rows[:3]}, "cka", "students")
    (axes,) = figure.axes
    assert [line.get_label() for line in axes.lines] == ["gla", "xlstm"]
    assert list(axes.lines[0].get_xdata()) == [0, 1, 2]
    assert list(axes.lines[0].get_ydata()) == pytest.approx([1, 0.9, 0.8])
    assert axes.lines[0].get_color() != axes.lines[1].get_color()
    assert axes.lines[0].get_marker() != axes.lines[1].get_marker()
    with pytest.raises(UserError, match="no rows of 'gla' have metric 'overlap' by layer"):
        layers_figure({"gla": rows}, "overlap", "students")


def test_many_models_are_told_apart():
    rows = [Result(task="states", metric="cka", value=1 - i / 10, layer=i) for i in range(2)]
    (axes,) = layers_figure({str(number): rows for number in range(11)}, "cka", "students").axes
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 11


def test_files_are_the_same_every_time(tmp_path):
    first, second = (save(matrices(), tmp_path / name) for name in ("first.v1", "second.v1"))
    assert [path.name for path in first] == ["first.v1.svg", "first.v1.png"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert first[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in first[0].read_text()
