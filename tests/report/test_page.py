"""The page of a study: what it says of what is missing, its files, and how a browser shows it."""

import csv
import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
from workshop import tiny_recipe

from subquad.cli import main
from subquad.config import load_study
from subquad.report.figures import pareto
from subquad.report.page import write_report
from subquad.report.style import MIXERS
from subquad.report.tables import Cell, Table
from subquad.study.grid import run_study
from tests.study.synthetic_study import STAGE_SETS, synthetic_recipes, write_study

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --virtual-time-budget=20000"""
PROBE = """
<!doctype html><meta charset="utf-8"><title>probe</title><body><script>
const page = PAGE, told = {errors: []};
async function look(width) {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width: ${width}px; height: 900px; border: 0`;
  const loaded = new Promise(done => frame.addEventListener("load", done));
  frame.srcdoc = page;
  document.body.append(frame);
  await loaded;
  frame.contentWindow.addEventListener("error", event => told.errors.push(event.message));
  const images = [...frame.contentDocument.images];
  await Promise.all(images.map(image => image.decode().catch(() => told.errors.push("an image cannot be shown"))));
  const root = frame.contentDocument.documentElement;
  const wide = [...frame.contentDocument.querySelectorAll("main *")].filter(one => !one.closest(".scroll, pre")
    && one.getBoundingClientRect().right > width + 1).map(one => one.outerHTML.slice(0, 120));
  told[width] = {page: root.scrollWidth, wide};
  return frame.contentDocument;
}
function column(table, index) { return [...table.tBodies[0].rows].map(row => row.cells[index].textContent.trim()); }
(async () => {
  await look(400);
  const document_ = await look(1400), table = document_.querySelector("table.sortable");
  const head = [...table.tHead.rows[0].cells];
  told.titles = head.map(one => one.textContent.trim());
  for (const title of ["perplexity", "mixer"]) {
    const index = told.titles.indexOf(title), button = head[index].querySelector("button");
    button.click();
    const up = column(table, index);
    button.click();
    told[title] = [up, column(table, index), head[index].getAttribute("aria-sort")];
  }
  told.images = document_.images.length;
  const out = document.createElement("pre");
  out.id = "told";
  out.textContent = JSON.stringify(told);
  document.body.replaceChildren(out);
})();
</script></body>
"""


def in_browser(page: Path) -> dict:
    """Opens a page in a headless browser at 400 and 1400 pixels, sorts its first table, and returns what was seen."""
    with tempfile.TemporaryDirectory() as work:
        probe = Path(work) / "probe.html"
        probe.write_text(PROBE.replace("PAGE", json.dumps(page.read_text()).replace("</", "<\\/")))
        profile = f"--user-data-dir={work}/profile"
        command = [CHROMIUM, *FLAGS.split(), profile, "--window-size=1500,1000", "--dump-dom", f"file://{probe}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:] + done.stdout[-500:]
    return {**json.loads(html.unescape(found.group(1))), "console": console}


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """Three mixers, three seeds, an evaluation."""
    output = tmp_path_factory.mktemp("full")
    write_study(output, synthetic_recipes(("gla", "gated_deltanet", "softmax"), STAGE_SETS[:2]))
    return output, write_report(output).read_text()


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to open the page with (Debian: apt-get install chromium)"
)
def test_a_browser_shows_it_on_a_phone_and_a_desk(full):
    seen = in_browser(full[0] / "report.html")
    assert seen["errors"] == []
    assert seen["console"] == []
    for width in (400, 1400):
        assert seen[str(width)] == {"page": width, "wide": []}
    assert seen["images"] > 10
    up, down, order = seen["perplexity"]
    numbers = [float(text.split()[0]) for text in up]
    assert numbers == sorted(numbers)
    assert len(numbers) == 10
    assert [float(text.split()[0]) for text in down] == sorted(numbers, reverse=True)
    assert order == "descending"
    up, down, _ = seen["mixer"]
    assert up == sorted(up)
    assert down == sorted(up, reverse=True)
    assert up != down


@pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium here to open the page with (Debian: apt-get install chromium)"
)
def test_the_browser_would_see_what_is_wrong(full, tmp_path):
    broken = full[1].replace("<main>", '<main><div style="width: 500px">wide</div><img src="data:image/png,no">')
    (tmp_path / "broken.html").write_text(broken.replace("<script>", "<script>console.error('no'); "))
    seen = in_browser(tmp_path / "broken.html")
    assert seen["400"]["page"] == 516
    assert "wide" in seen["400"]["wide"][0]
    assert seen["1400"] == {"page": 1400, "wide": []}
    assert seen["errors"] == ["an image cannot be shown"] * 2
    assert len(seen["console"]) == 2


def test_the_page_needs_nothing_but_itself(full):
    _, page = full
    for asks in re.findall(r'(?:src|href)="([^"]{0,40})', page):
        assert asks.startswith("data:"), asks
    assert "http://" not in page
    assert "https://" not in page
    assert "@import" not in page


def test_every_figure_is_there_as_svg_and_pdf_and_every_table_as_csv_and_latex(full):
    output, page = full
    pictures = set(re.findall(r"report/([\w-]+)\.svg, \.pdf", page))
    tables = set(re.findall(r"report/([\w-]+)\.csv, \.tex", page))
    files = {path.name for path in (output / "report").iterdir()}
    assert files == {f"{n}.{e}" for n in pictures for e in ("svg", "pdf")} | {
        f"{n}.{e}" for n in tables for e in ("csv", "tex")
    }
    assert {
        "recovered",
        "pareto",
        "perplexity",
        "cost-seconds_per_token",
        "cost-cache_bytes",
        "recall-needle",
        "overlap-layers",
        "overlap-heads",
        "cka-layers",
        "student",
        "loss-123-matrix",
        "loss-23-end_to_end",
    } <= pictures
    assert {"matrices-gla", "matrices-gated_deltanet", "matrices-softmax"} <= pictures
    assert {"grid", "evaluation-cost", "evaluation-text"} <= tables
    with (output / "report" / "grid.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    first = rows[0]
    assert (first["mixer"], first["stages"], first["copied"], first["seeds"]) == ("gated deltanet", "1+2+3", "yes", "3")
    assert float(first["perplexity low"]) < float(first["perplexity"]) < float(first["perplexity high"])
    latex = (output / "report" / "grid.tex").read_text()
    assert all(rule in latex for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"\%" in latex
    assert latex.count(r"\textbf{") == page.count("<b>")
    assert page.count("<b>") > 0


def test_a_failed_run_a_single_seed_and_no_evaluation_are_said(tmp_path, capsys):
    write_study(
        tmp_path / "poor",
        synthetic_recipes(("gla", "retnet"), STAGE_SETS[:1], seeds=(0,)),
        failed_index=0,
        evaluated=False,
    )
    assert main(["report", str(tmp_path / "poor"), "--output", str(tmp_path / "page.html")]) == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert "1 of 4 runs failed: gla-copy_qkv=true" in page
    assert "the loss is &lt;not&gt; finite" in page
    assert "where &amp; why" in page
    assert "One seed of everything" in page
    assert "No evaluation is here" in page
    assert "<b>" not in page
    assert "0, 1 failed" in page


def test_a_study_that_has_not_begun_and_one_that_is_none(tmp_path, capsys):
    write_study(
        tmp_path / "s", synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0,)), failed_index=0, evaluated=False
    )
    assert "No run is finished yet" in write_report(tmp_path / "s").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert "holds no results.json" in capsys.readouterr().err


def test_runs_of_an_older_recipe_are_left_out_and_said(tmp_path):
    write_study(tmp_path, synthetic_recipes(("gla", "retnet"), STAGE_SETS[:1], (True,), (0, 1)), evaluated=False)
    write_study(tmp_path, synthetic_recipes(("gla",), STAGE_SETS[:1], (True,), (0, 1)))
    page = write_report(tmp_path).read_text()
    assert "2 more runs lie in this directory" in page
    assert "retnet" not in page


def test_a_trained_study_with_a_hybrid_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBQUAD_CACHE", str(tmp_path / "cache"))
    recipe = tiny_recipe(tmp_path / "inputs")
    run_study(load_study(recipe, ["student.layer_types=[null, {default: gla, 1: attention}]"]), tmp_path / "study")
    page = write_report(tmp_path / "study").read_text()
    assert "hybrid" in page
    assert (tmp_path / "study" / "report" / "student.svg").exists()


def test_the_same_results_give_the_same_page(full):
    output, page = full
    assert write_report(output).read_text() == page


def test_mixers_are_told_apart_by_colour_and_by_marker():
    assert len({colour for colour, _ in MIXERS.values()}) == len(MIXERS)
    assert len({marker for _, marker in MIXERS.values()}) == len(MIXERS)
    from subquad import mixers

    assert set(mixers.names()) <= set(MIXERS)


def test_the_front_is_what_nothing_beats_in_both():
    assert pareto([(3, 1), (1, 3), (2, 2), (2, 5), (4, 1)]) == [1, 2, 0]


def test_latex_and_csv_of_odd_cells(tmp_path):
    lines = ((Cell("a_b & 5%"), Cell("1.5", 1.5, True)), (Cell("x^2"), Cell("–", float("inf"))))
    table = Table("t", "", ("name", "value, %"), lines)
    table.to_latex(tmp_path / "t.tex")
    assert r"a\_b \& 5\% & \textbf{1.5} \\" in (tmp_path / "t.tex").read_text()
    table.to_csv(tmp_path / "t.csv")
    assert list(csv.reader((tmp_path / "t.csv").open())) == [["name", "value, %"], ["a_b & 5%", "1.5"], ["x^2", ""]]
