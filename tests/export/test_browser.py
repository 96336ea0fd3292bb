"""examples/browser: its page in headless Chromium, with packages from npm, writes the tokens of `transformers`."""

import json
import re
import shutil
import subprocess
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import subquad
from subquad.export import export

PAGE = Path(__file__).parents[2] / "examples" / "browser"
PROMPT = "def main(argv=None):"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script type="module">
const tell = (found) => fetch("/found", { method: "POST", body: JSON.stringify(found) });
addEventListener("error", (event) => tell({ error: event.message }));
addEventListener("unhandledrejection", (event) => tell({ error: String(event.reason) }));
const button = document.getElementById("write"), output = document.getElementById("output");
while (button.disabled) await new Promise((done) => setTimeout(done, 100));
button.click();
while (!output.dataset.tokens) await new Promise((done) => setTimeout(done, 100));
tell({ tokens: JSON.parse(output.dataset.tokens), text: output.textContent });
</script>
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.skipif(shutil.which("npm") is None, reason="there is no npm"),
]


class Handler(SimpleHTTPRequestHandler):
    """Serves a directory and keeps what the page posts."""

    def do_POST(self):
        self.server.found.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        pass


def local_packages(text: str, directory: Path) -> str:
    """The page with packages of its import map from npm, below `directory`, in place of those of a CDN."""
    for name, version, path in re.findall(r'"https://[^"]*/npm/([^"]+)@([\d.]+)/([^"]+)"', text):
        done = subprocess.run(
            ["npm", "pack", f"{name}@{version}"], cwd=directory, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            pytest.skip(f"npm has no {name}: {done.stderr[-200:]}")
        folder = name.split("/")[-1]
        with tarfile.open(directory / done.stdout.split()[-1]) as archive:
            archive.extractall(directory / folder, filter="data")
        text = re.sub(rf'"https://[^"]*{re.escape(name)}@[^"]*"', f'"./{folder}/package/{path}"', text)
    return text


def test_page_writes_the_students_greedy_tokens(tmp_path):
    pytest.importorskip("onnxruntime")
    teacher, tokenizer = subquad.load_teacher("nano")
    student = subquad.linearize(teacher, "gated_deltanet")
    for saved in (student, tokenizer):
        saved.save_pretrained(tmp_path / "student")
    site = tmp_path / "site"
    shutil.copytree(PAGE, site, ignore=shutil.ignore_patterns("model"))
    export(tmp_path / "student", site / "model", "onnx")
    (site / "index.html").write_text(local_packages((site / "index.html").read_text(), site) + PROBE)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site)))
    server.found, server.done = [], threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/index.html"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.Popen([CHROMIUM, *flags, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert server.done.wait(240), "the page reports nothing"
    finally:
        browser.kill()
        browser.wait()
        server.shutdown()
    found = server.found[0]
    assert "error" not in found, found
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": len(found["tokens"])}
    expected = student.generate(ids, **options)[0, ids.shape[1] :].tolist()
    assert len(expected) == 40
    assert found["tokens"] == expected
    assert found["text"] == tokenizer.decode(torch.cat([ids[0], torch.tensor(expected)]), skip_special_tokens=True)
