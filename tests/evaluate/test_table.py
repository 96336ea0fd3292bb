"""Tables of results: lines, columns, widths."""

from subquad.evaluate.results import Result
from subquad.evaluate.table import WIDTH, column_title, format_tables, terminal_width, wide_table


def test_table_has_a_line_per_model_and_a_column_per_metric():
    results = [
        Result("text", "perplexity", 20.5, stderr=0.25, model="gla"),
        Result("text", "perplexity", 10.0, model="nano"),
        Result("text", "kl", 0.5, model="gla"),
        Result("cost", "cache_bytes", 2.0**20, length=1024, batch=8, model="gla"),
        Result("cost", "seconds_per_token", 0.002, length=1024, model="gla"),
    ]
    text = format_tables(results)
    assert "20.50 ±0.25" in text
    assert "cache (1,024\n" not in text
    assert " tokens × 8)" in text
    assert "1.05 MB" in text
    assert "2.0 ms" in text
    lines = text.splitlines()
    assert lines[0] == "text"
    assert sum(line.startswith("nano") for line in lines) == 1


def test_tables_are_as_wide_as_the_terminal(monkeypatch):
    metrics = ["perplexity", "bits_per_byte", "kl", "top1_agreement", "recovered_share", "degradation_length"]
    results = [Result("text", name, 12.5, 0.25, model="a student of the teacher") for name in metrics]
    results += [Result("text", "cache_bytes", 1e6, length=length, model="gla") for length in (512, 1024, 2048)]
    text = format_tables(results, 80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("a student of the teacher") == 3
    assert "degradation" in text
    narrow = format_tables(results, 20)
    assert narrow.count("a student of the teacher") == len(metrics) + 3
    monkeypatch.setenv("COLUMNS", "44")
    assert terminal_width() == 44
    monkeypatch.delenv("COLUMNS")
    assert terminal_width() == WIDTH  # pytest's stdout is not a terminal
    assert wide_table([["mixer", "KL init"], ["gla", "0.5"]]) == "mixer  KL init\n--------------\ngla        0.5"


def test_column_titles_are_readable():
    assert column_title("topk_mass_overlap") == "top-k mass overlap"
    assert column_title("mass_2_3", 256) == "attention mass at distance 2–3 (256 tokens)"
    assert column_title("accuracy_ratio_above_chance") == "accuracy ratio above chance"
