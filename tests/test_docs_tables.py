"""The tables in the documentation are those that their result files give."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def load_script():
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts" / "docs_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_equal_their_result_files(capsys):
    assert load_script().main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_noticed(tmp_path, monkeypatch):
    script = load_script()
    page = tmp_path / "page.md"
    page.write_text("<!-- table: nano/recovered -->\n" + script.table("nano/recovered") + "<!-- end -->\n")
    monkeypatch.setattr(script, "pages", lambda: [page])
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.main(["--check"]) == 0
    page.write_text(page.read_text().replace("89.7", "89.8"))
    assert script.main(["--check"]) == 1
    assert script.main([]) == 0
    assert script.main(["--check"]) == 0
