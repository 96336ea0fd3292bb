"""Figures show the given numbers, and their files are reproducible."""

import pytest
import torch

from subquad.analysis.plot_style import points_by, save_figure
from subquad.analysis.plots import MIN_SHARE, cka_figure, half_life_figure, matrices_figure, recall_figure
from subquad.evaluate.results import Result
from tests.helpers.known_models import previous_matrix, uniform_matrix

RECALL = [
    Result(task=task, metric="acc", value=length / 1000 + depth / 2, length=length, depth=depth)
    for task in ("needle_number", "induction")
    for length in (128, 256)
    for depth in (0.0, 0.5, 1.0)
]
COPY = [
    Result(task="copy", metric=metric, value=value, length=128) for metric, value in (("acc", 0.75), ("chance", 0.25))
]


def example_figure():
    return matrices_figure({(0, 1): (3 * uniform_matrix(12), previous_matrix(12))}, "nano and a student")


def test_matrices_figure_shows_shares_of_rows():
    figure = example_figure()
    teacher, student = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert teacher[5, 4] == 1
    assert teacher[5, 2] == MIN_SHARE
    assert student[7, 3] == pytest.approx(1 / 8)
    assert teacher.mask[3, 4]  # later tokens
    assert student.mask[3, 4]
    assert figure.axes[0].get_title() == "layer 0, head 1"
    assert figure.axes[0].get_ylabel().startswith("teacher")
    assert figure.axes[1].get_ylabel().startswith("student")
    assert figure.axes[1].get_xlabel() == "key"


def test_half_life_figure_shows_channels_and_medians():
    layers = [torch.tensor([[1.0, 2, 4], [8, 8, 64]]), None, torch.tensor([16.0, 32.0])]
    (axes,) = half_life_figure(layers, "decays").axes
    channels, medians = (line for line in axes.lines if line.get_marker() != "None")
    assert list(channels.get_ydata()) == [1, 2, 4, 8, 8, 64]
    assert list(medians.get_ydata()) == [2, 8, 16, 32]
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["channel", "median of a head"]
    assert [round(x) for x in channels.get_xdata()] == [0] * 6
    assert [round(x) for x in medians.get_xdata()] == [0, 0, 2, 2]
    assert axes.get_yscale() == "log"
    assert "tokens" in axes.get_ylabel()


def test_recall_figure_has_a_cell_per_length_and_depth():
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


def test_cka_figure_has_a_line_of_its_own_style_per_model():
    names = [f"student {number}" for number in range(11)]
    figure = cka_figure([Result("states", "cka", 1 - i / 10, layer=i, model=name) for name in names for i in (2, 0, 1)])
    (axes,) = figure.axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names
    for line in axes.lines:
        assert list(line.get_xdata()) == [0, 1, 2]
        assert list(line.get_ydata()) == pytest.approx([1, 0.9, 0.8])
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 11


def test_points_are_means_over_heads_only_without_results_of_layers():
    heads = [Result("matrices", "entropy", value, layer=1, head=head) for head, value in enumerate((1.0, 4.0))]
    assert points_by("layer", [*heads, Result("matrices", "entropy", 9.0)]) == [(1, 2.5)]
    assert points_by("layer", [*heads, Result("matrices", "entropy", 3.0, layer=1)]) == [(1, 3)]


def test_files_are_reproducible(tmp_path):
    first, second = (save_figure(example_figure(), tmp_path / name, "svg", "png") for name in ("first.v1", "second.v1"))
    assert [path.name for path in first] == ["first.v1.svg", "first.v1.png"]
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
    assert first[1].read_bytes().startswith(b"\x89PNG")
    assert "<svg" in first[0].read_text()
