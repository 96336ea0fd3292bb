"""The report page: its files, its notes on missing results, its rendering in a browser, and its plots and tables."""

import csv
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from subquad.analysis.plot_style import MIXER_STYLES, label_points, new_figure
from subquad.cli import main
from subquad.config import Data, load_study
from subquad.evaluate.results import Result
from subquad.report.figures import pareto_front
from subquad.report.page import mark_code, write_report
from subquad.report.tables import MISSING, Cell, Table
from subquad.study.candidates import Row
from subquad.study.frontier import Frontier, write
from subquad.study.grid import run_study
from tests.helpers.recipes import tiny_recipe
from tests.helpers.studies import STAGE_SETS, synthetic_recipes, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=20000"""
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt-get install chromium)")
PROBE = """
<!doctype html><meta charset="utf-8"><title>probe</title><body><script>
const page = PAGE, seen = {errors: []};
async function measure(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(done => frame.addEventListener("load", done));
  frame.srcdoc = page;
  document.body.append(frame);
  await loaded;
  frame.contentWindow.addEventListener("error", event => seen.errors.push(event.message));
  const images = [...frame.contentDocument.images];
  await Promise.all(images.map(image => image.decode().catch(() => seen.errors.push("image not decodable"))));
  const root = frame.contentDocument.documentElement;
  const wide = [...frame.contentDocument.querySelectorAll("main *")].filter(one => !one.closest(".scroll, pre")
    && one.getBoundingClientRect().right > width + 1).map(one => one.outerHTML.slice(0, 120));
  seen[width] = {page: root.scrollWidth, wide};
  const scroll = frame.contentDocument.querySelector(".scroll"), heads = [...scroll.querySelectorAll("th")];
  const perplexity = heads.find(one => one.textContent.trim() === "perplexity");
  seen[`table ${width}`] = {cut: scroll.scrollWidth - scroll.clientWidth,
    perplexity: perplexity.getBoundingClientRect().right, button: perplexity.getBoundingClientRect().left};
  return frame.contentDocument;
}
function column(table, index) { return [...table.tBodies[0].rows].map(row => row.cells[index].textContent.trim()); }
(async () => {
  await measure(400);
  await measure(420);
  const document_ = await measure(1400), table = document_.querySelector("table.sortable");
  const head = [...table.tHead.rows[0].cells];
  seen.titles = head.map(one => one.textContent.trim());
  for (const title of ["perplexity", "mixer"]) {
    const index = seen.titles.indexOf(title), button = head[index].querySelector("button");
    button.click();
    const up = column(table, index);
    button.click();
    seen[title] = [up, column(table, index), head[index].getAttribute("aria-sort")];
  }
  seen.images = document_.images.length;
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen);
  document.body.replaceChildren(out);
})();
</script></body>
"""


def open_in_browser(page: Path) -> dict:
    """Opens a page in a headless browser at widths of 400 and 1400 pixels and sorts its first table.

    Returns errors, overflowing elements, sorted columns and console messages.
    """
    with tempfile.TemporaryDirectory() as directory:
        probe = Path(directory) / "probe.html"
        probe.write_text(PROBE.replace("PAGE", json.dumps(page.read_text()).replace("</", "<\\/")))
        profile = f"--user-data-dir={directory}/profile"
        command = [CHROMIUM, *FLAGS.split(), profile, "--window-size=1500,1000", "--dump-dom", f"file://{probe}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    match = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:] + done.stdout[-500:]
    return {**json.loads(html.unescape(match.group(1))), "console": console}


@pytest.fixture(scope="module")
def full_report(tmp_path_factory):
    """Directory and page of a study with three mixers, three seeds and an evaluation."""
    output = tmp_path_factory.mktemp("full")
    write_study(output, synthetic_recipes(("gla", "gated_deltanet", "softmax"), STAGE_SETS[:2]))
    return output, write_report(output).read_text()


@needs_chromium
def test_page_fits_narrow_and_wide_screens_and_its_table_sorts(full_report):
    found = open_in_browser(full_report[0] / "report.html")
    assert found["errors"] == []
    assert found["console"] == []
    for width in (400, 1400):
        assert found[str(width)] == {"page": width, "wide": []}
    assert found["images"] > 10
    assert found["table 1400"]["cut"] == 0
    assert found["table 420"]["perplexity"] < 420
    up, down, order = found["perplexity"]
    numbers = [float(text.split()[0]) for text in up]
    assert numbers == sorted(numbers)
    assert len(numbers) == 11  # with the teacher
    assert [float(text.split()[0]) for text in down] == sorted(numbers, reverse=True)
    assert order == "descending"
    up, down, _ = found["mixer"]
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert up != down


@needs_chromium
def test_browser_check_detects_overflow_broken_images_and_errors(full_report, tmp_path):
    broken = full_report[1].replace("<main>", '<main><div style="width: 500px">wide</div><img src="data:image/png,no">')
    (tmp_path / "broken.html").write_text(broken.replace("<script>", "<script>console.error('no'); "))
    found = open_in_browser(tmp_path / "broken.html")
    assert found["400"]["page"] == 516
    assert "wide" in found["400"]["wide"][0]
    assert found["1400"] == {"page": 1400, "wide": []}
    assert found["errors"] == ["image not decodable"] * 3
    assert len(found["console"]) == 3


def test_the_top_of_the_page(full_report):
    """The best student, its quality, its cost and how sure that is; what it writes; notes without backticks."""
    _, page = full_report
    top = page.partition("<h2>All students")[0]
    assert re.findall("<h3>(.*?)</h3>", top)[:4] == ["Best student", "Quality", "Cost", "How sure"]
    assert "the teacher&#39;s 1.8 MB; it decodes" in top
    assert "<pre>argv=None):\n    `x` &lt; 1</pre>" in top
    assert mark_code("`a <b>` or c") == "<code>a &lt;b&gt;</code> or c"


def test_figures_of_a_section_share_one_key(full_report):
    _, page = full_report
    assert page.count('class="key"') >= 3
    training = page.partition("<h2>Training")[2].partition("<h2>")[0]
    assert training.count('class="key"') == 1
    assert training.count("<figure") == 5


def test_the_caption_names_the_front(full_report):
    _, page = full_report
    front = re.search(r"Pareto front: (.*?)\. Files: report/pareto.svg", page)[1]
    names = re.findall(r"\d (gated deltanet|gla|softmax) ", front)
    assert len(names) == front.count(", ") + 1
    assert len(set(front.split(", "))) == len(names)


def test_labels_keep_away_from_points_and_each_other():
    points = [(1.0, 1.0), (1.02, 1.02), (1.02, 0.98), (2.0, 2.0)]
    _, axes = new_figure()
    for point in points:
        axes.plot(*point, "o")
    label_points(axes, points, {0: "1", 3: "2"})
    first, second = axes.texts
    assert first.xyann[0] < 0  # the others are on the right
    assert (first.get_text(), second.get_text()) == ("1", "2")


def test_page_is_self_contained(full_report):
    _, page = full_report
    for reference in re.findall(r'(?:src|href)="([^"]{0,40})', page):
        assert reference.startswith("data:"), reference
    assert not re.search("https?://|@import", page)


def test_every_figure_and_table_is_written_to_files(full_report):
    output, page = full_report
    figures = set(re.findall(r"report/([\w-]+)\.svg, \.pdf", page))
    tables = set(re.findall(r"report/([\w-]+)\.csv, \.tex", page))
    files = {path.name for path in (output / "report").iterdir()}
    assert files == {f"{n}.{e}" for n in figures for e in ("svg", "pdf")} | {
        f"{n}.{e}" for n in tables for e in ("csv", "tex")
    }
    expected = "recovered pareto perplexity cost-seconds_per_token cost-cache_bytes recall-needle student cka-layers"
    expected += " topk_mass_overlap-layers topk_mass_overlap-heads loss-123-matrix loss-23-end_to_end"
    expected += " matrices-gla matrices-gated_deltanet matrices-softmax"
    assert set(expected.split()) <= figures
    assert {"grid", "evaluation-cost", "evaluation-text"} <= tables
    with (output / "report" / "grid.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 11
    teacher, first, *_ = lines
    assert (teacher["mixer"], teacher["KL, nats"], teacher["recovered, %"]) == ("teacher", "0.0", "100.0")
    assert (teacher["state, kB"], teacher["decoding, tokens/s"], teacher["seeds"]) == ("1800.0", "90.0", "")
    assert (first["mixer"], first["stages"], first["copied"], first["seeds"]) == ("gated deltanet", "1+2+3", "yes", "3")
    assert float(first["perplexity low"]) < float(first["perplexity"]) < float(first["perplexity high"])
    with (output / "report" / "evaluation-text.csv").open() as file:
        assert [line["model"] for line in csv.DictReader(file)][:2] == ["nano", "window 45 + 4 sinks"]
    latex = (output / "report" / "grid.tex").read_text()
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"\%" in latex
    assert latex.count(r"\textbf{") == page.count("<b>")
    assert page.count("<b>") > 0


def test_notes_name_failed_runs_single_seeds_and_a_missing_evaluation(tmp_path, capsys):
    recipes = synthetic_recipes(("gla", "retnet"), STAGE_SETS[:1], seeds=(0,))
    write_study(tmp_path / "s", recipes, failed_index=0, evaluated=False)
    assert main(["report", str(tmp_path / "s"), "--output", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    for text in (
        *("1 of 4 runs failed: gla-copy_qkv=true", "the loss is &lt;not&gt; finite", "where &amp; why"),
        *("Every student has one seed", "The study has no evaluation", "0 (1 failed)"),
    ):
        assert text in page
    assert "<b>" not in page


def test_markup_in_recipes_and_results_is_escaped(tmp_path):
    """Values of recipes are part of the runs' names, of tables, captions and figures."""
    markup = "<script>alert('{}')</script>"
    recipes = [
        recipe.model_copy(update={"teacher": markup.format("teacher"), "data": Data(source=markup.format(k))})
        for k, recipe in enumerate(synthetic_recipes(("gla", "retnet", "xlstm"), STAGE_SETS[:1], (True,), (0,)))
    ]
    runs = write_study(tmp_path / "s", recipes, failed_index=0)
    page = write_report(tmp_path / "s").read_text()
    assert not any(path.is_dir() for path in tmp_path.glob("s/*/*") if "script" in path.name)
    assert "<script>alert(" not in page
    assert "&lt;script&gt;" in page
    assert len(runs) == 3


@pytest.mark.parametrize("content", ['{"result": {}}', '{"result": []}', "[]", '{"result": {"kl": "x"}}'])
def test_damaged_results_are_named(tmp_path, capsys, content):
    runs = write_study(tmp_path, synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0,)), evaluated=False)
    (runs[0].directory / "result.json").write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path}: cannot be drawn" in capsys.readouterr().err


def test_a_study_without_finished_runs_and_a_directory_without_a_study(tmp_path, capsys):
    recipes = synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0,))
    write_study(tmp_path / "s", recipes, failed_index=0, evaluated=False)
    assert "No run is finished yet" in write_report(tmp_path / "s").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert "results.json" in capsys.readouterr().err


def test_runs_of_an_earlier_recipe_are_left_out_with_a_note(tmp_path):
    write_study(tmp_path, synthetic_recipes(("gla", "retnet"), STAGE_SETS[:1], (True,), (0, 1)), evaluated=False)
    write_study(tmp_path, synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0, 1)))
    page = write_report(tmp_path).read_text()
    assert "2 other runs in this directory" in page
    assert "retnet" not in page


def test_the_frontier_has_a_figure_and_a_table(tmp_path):
    write_study(tmp_path, synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0,)), evaluated=False)
    assert "Quality against bytes" not in write_report(tmp_path).read_text()
    rows = [
        Row("nano", "teacher"),
        Row("nano, window 96 + 4 sinks", "uniform window", 96),
        Row("gla", "recipe", None, True),
    ]
    results = [
        result
        for row, size, loss in zip(rows, (8e6, 4e5, 2e5), (3.1, 3.4, 3.6), strict=True)
        for result in (
            Result("cost", "cache_bytes", size, length=64, model=row.model),
            Result("text", "loss", loss, model=row.model),
        )
    ]
    (tmp_path / "frontier").mkdir()
    write(Frontier(rows, results, {}, 64), tmp_path / "frontier")
    page = write_report(tmp_path).read_text()
    assert "Quality against bytes of cache" in page
    assert "400 kB" in page
    assert (tmp_path / "report" / "frontier.svg").exists()
    with (tmp_path / "report" / "frontier.csv").open() as file:
        assert [(line["model"], line["loss"]) for line in csv.DictReader(file)] == [
            ("nano", "3.1"),
            ("nano, window 96 + 4 sinks", "3.4"),
            ("gla", "3.6"),
        ]


def test_a_trained_study_with_a_hybrid_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tmp_path / "inputs")
    run_study(load_study(recipe, ["student.layer_types=[null, {default: gla, 1: attention}]"]), tmp_path / "study")
    page = write_report(tmp_path / "study").read_text()
    assert "hybrid" in page
    assert (tmp_path / "study" / "report" / "student.svg").exists()


def test_identical_results_give_an_identical_page(full_report):
    output, page = full_report
    assert write_report(output).read_text() == page


def test_every_mixer_has_its_own_color_and_marker():
    assert len({color for color, _ in MIXER_STYLES.values()}) == len(MIXER_STYLES)
    assert len({marker for _, marker in MIXER_STYLES.values()}) == len(MIXER_STYLES)
    from subquad import mixers

    assert set(mixers.names()) <= set(MIXER_STYLES)


def test_pareto_front_contains_the_points_that_no_other_beats_in_both():
    assert pareto_front([(3, 1), (1, 3), (2, 2), (2, 5), (4, 1)]) == [1, 2, 0]


def test_special_characters_in_latex_and_csv(tmp_path):
    rows = (Cell("a_b & 5% × 2"), Cell("1.5", 1.5, True)), (Cell("x^2"), MISSING)
    table = Table("t", "", [dict(zip(("name", "value, %"), row, strict=True)) for row in rows])
    table.to_latex(tmp_path / "t.tex")
    assert r"a\_b \& 5\% × 2 & \textbf{1.5} \\" in (tmp_path / "t.tex").read_text()
    table.to_csv(tmp_path / "t.csv")
    assert list(csv.reader((tmp_path / "t.csv").open())) == [["name", "value, %"], ["a_b & 5% × 2", "1.5"], ["x^2", ""]]
