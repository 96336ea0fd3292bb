"""Draws docs/figures/load.svg: a student and its teacher under load in llama.cpp (results/export/load-llama-cpp.csv).

python scripts/draw_load.py
"""

import csv
from pathlib import Path

import matplotlib
from matplotlib.ticker import FixedLocator, NullLocator

from subquad.analysis.plot_style import RC_PARAMS, TEACHER_COLOR, color, new_figure

ROOT = Path(__file__).parents[1]
STYLES = {"student": (color("gated_deltanet"), "X"), "teacher": (TEACHER_COLOR, "o")}
PANELS = {"generation": "tokens/s of all requests", "memory": "memory of the server, MB"}


def main() -> None:
    with (ROOT / "results" / "export" / "load-llama-cpp.csv").open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["generation"]]
    requests = sorted({int(row["requests"]) for row in rows})
    with matplotlib.rc_context(RC_PARAMS):
        figure, _ = new_figure(7.2, 2.7)
        figure.clear()
        panels = figure.subplots(1, len(PANELS))
        for axes, (column, label) in zip(panels, PANELS.items(), strict=True):
            for model, (line_color, marker) in STYLES.items():
                for number, style in zip(requests, (":", "--", "-"), strict=True):
                    own = [row for row in rows if row["model"] == model and int(row["requests"]) == number]
                    points = sorted((int(row["context"]), float(row[column])) for row in own)
                    if column == "memory" and number != requests[1]:
                        continue  # llama.cpp allocates for the most requests when it starts
                    name = model if column == "memory" else f"{model}, {number} at once"
                    axes.plot(*zip(*points, strict=True), style, color=line_color, marker=marker, label=name)
            axes.set(xscale="log", yscale="log", xlabel="tokens of context", ylabel=label)
            contexts = sorted({int(row["context"]) for row in rows})
            axes.xaxis.set_major_locator(FixedLocator(contexts))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticklabels([f"{context // 1024}k" for context in contexts])
            axes.legend(fontsize=6.5)
        figure.savefig(ROOT / "docs" / "figures" / "load.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
