"""Measures reading JSON lines, tokenizing them with nano's tokenizer and packing them into rows.

    python -m benchmarks.data [--megabytes 100] [--repeats 3] [--against DIRECTORY] [--json FILE]

The text is generated: pieces of the Python standard library, of 200 to 4,000 characters. Each run is a fresh process
with an empty token cache. With `--against`, runs alternate with those of another checkout of this repository.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import ROOT, Parser, machine, output_file, positive, run_as_script, write_json

RUN = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
import subquad
from subquad.config import Data
from subquad.data import token_rows
tokenizer = AutoTokenizer.from_pretrained(Path(subquad.__file__).parent / "nano")
start = time.perf_counter()
rows = token_rows(Data(source=sys.argv[1], validation="python-stdlib", seq_len=512), tokenizer, "train")
rows[0]
print(time.perf_counter() - start, time.process_time(), len(rows))
"""


def write_text(path: Path, size: float) -> None:
    """JSON lines of about `size` bytes, always the same for one version of Python."""
    from subquad.data import documents

    text, rng = "\n".join(map(str, documents("python-stdlib", "all"))), random.Random(0)
    with path.open("w") as file:
        while file.tell() < size:
            start = rng.randrange(len(text) - 4000)
            file.write(json.dumps({"text": text[start : start + rng.randint(200, 4000)]}) + "\n")


def run(checkout: Path, path: Path) -> list[float]:
    """Seconds, processor seconds of the process, and rows of one run."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "SUBQUAD_CACHE": cache}
        command = [sys.executable, "-c", RUN, str(path)]
        done = subprocess.run(command, env=environment, cwd=cache, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [float(value) for value in done.stdout.split()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("data", __doc__)
    parser.add_argument("--megabytes", type=positive, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="DIRECTORY")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args(argv)
    checkouts = [ROOT] if args.against is None else [args.against.resolve(), ROOT]
    runs: dict[Path, list[list[float]]] = {checkout: [] for checkout in checkouts}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "text.jsonl")
        write_text(path, args.megabytes * 1e6)
        for _ in range(args.repeats):
            for checkout in checkouts:
                runs[checkout].append(run(checkout, path))
    results = []
    for checkout in checkouts:
        seconds, processor, rows = (statistics.median(values) for values in zip(*runs[checkout], strict=True))
        medians = {"seconds": seconds, "processor_seconds": processor, "rows": rows}
        results.append({"checkout": checkout.name, **medians, "runs": runs[checkout]})
        print(f"{checkout.name}: {seconds:.1f} s, {processor:.1f} s of processor time, {rows:.0f} rows of 512 tokens")
    write_json(args.json, {"machine": machine(), "megabytes": args.megabytes, "results": results})
    return 0


if __name__ == "__main__":
    run_as_script(main)
