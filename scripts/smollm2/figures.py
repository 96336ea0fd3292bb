"""Figures and CSV tables of results/smollm2-135m, from its JSON files.

    python -m scripts.smollm2.figures

- `recipes.svg`: loss above the teacher's by mixer, for the published recipe and for ours, at a quarter of the tokens;
- `contexts.svg`: perplexity against the position in a text, of ours, of the window of equal bytes and of the teacher;
- `recipes.csv`, `untrained.csv`, `evaluation.csv`: the records.
"""

import csv
import json
from pathlib import Path

import matplotlib

from scripts.docs_tables import quarter_gaps
from subquad.analysis.plot_style import (
    GRAY,
    RC_PARAMS,
    TEACHER_COLOR,
    add_legend,
    format_log_axis,
    legend_line,
    look,
    mixer_label,
    new_figure,
    save_figure,
)

RESULTS = Path(__file__).resolve().parents[2] / "results" / "smollm2-135m"


def read(name: str, key: str | None = None) -> list[dict]:
    found = json.loads((RESULTS / f"{name}.json").read_text())
    return found if key is None else found[key]


def write_csv(name: str, rows: list[dict]) -> None:
    fields = list(dict.fromkeys(field for row in rows for field in row))
    with (RESULTS / f"{name}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw_recipes(windows: list[dict]) -> None:
    gaps = {recipe: quarter_gaps(recipe) for recipe in ("paper", "pure")}
    mixers = sorted(gaps["pure"], key=gaps["pure"].__getitem__, reverse=True)
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = new_figure(width=5.0, height=3.2)
        for y, mixer in enumerate(mixers):
            color = look(mixer)["color"]
            axes.plot(gaps["pure"][mixer], y, "o", color=color)
            if mixer in gaps["paper"]:
                axes.plot(gaps["paper"][mixer], y, "o", color=color, markerfacecolor="none")
                axes.plot([gaps["pure"][mixer], gaps["paper"][mixer]], [y, y], color=color, linewidth=0.8, zorder=0)
        for row in windows:
            axes.axvline(row["loss_above_teacher"], color=GRAY, linestyle=":", linewidth=1)
        axes.set_yticks(range(len(mixers)), [mixer_label(mixer) for mixer in mixers])
        axes.set_xlabel("loss above the teacher's, nats per token")
        axes.set_xscale("log")
        format_log_axis(axes.xaxis, [*gaps["pure"].values(), *gaps["paper"].values(), 0.05])
        handles = [
            legend_line("ours", marker="o", linestyle="none"),
            legend_line("published recipe", marker="o", linestyle="none", markerfacecolor="none"),
            legend_line("windows of 96 and 32 + 4 sinks, untrained", linestyle=":"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
    save_figure(figure, RESULTS / "recipes", "svg")


def draw_contexts(results: list[dict]) -> None:
    lines: dict[str, dict[int, float]] = {}
    for result in results:
        if result["metric"] == "perplexity_by_position":
            lines.setdefault(result["model"], {})[result["length"]] = result["value"]
    ours = {name.partition("/")[2]: line for name, line in lines.items() if name.startswith("pure/")}
    windows = {name: line for name, line in lines.items() if ", window" in name}
    teacher = next(line for name, line in lines.items() if "/" not in name and ", " not in name)
    with matplotlib.rc_context(RC_PARAMS):
        figure, axes = new_figure(width=5.0, height=3.8)
        for mixer, line in ours.items():
            axes.plot([*line], [*line.values()], markersize=4, **look(mixer))
        for line in windows.values():
            axes.plot([*line], [*line.values()], color=GRAY, linestyle=":")
        axes.plot([*teacher], [*teacher.values()], color=TEACHER_COLOR, linestyle="--")
        axes.set_xscale("log")
        axes.set_yscale("log")
        format_log_axis(axes.xaxis, [*teacher], [*teacher])
        format_log_axis(axes.yaxis, [value for line in lines.values() for value in line.values()])
        axes.set_xlabel("position in the text, tokens (up to)")
        axes.set_ylabel("perplexity")
        extra = [legend_line("teacher", color=TEACHER_COLOR, linestyle="--")]
        add_legend(figure, ours, [*extra, legend_line("window of equal bytes", linestyle=":")])
    save_figure(figure, RESULTS / "contexts", "svg")


def main() -> None:
    recipes, untrained, evaluation = read("recipes", "rows"), read("untrained"), read("evaluation", "results")
    for name, rows in {"recipes": recipes, "untrained": untrained, "evaluation": evaluation}.items():
        write_csv(name, rows)
    shown = ("window 96 + 4 sinks", "window 32 + 4 sinks")
    draw_recipes([row for row in untrained if row["seq_len"] == 256 and row["model"] in shown])
    draw_contexts(evaluation)


if __name__ == "__main__":
    main()
