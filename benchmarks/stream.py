"""Streams a generated text to 80% and resumes there in another process: peak memory, times, whether rows are equal.

    python -m benchmarks.stream [--gigabytes 5] [--files 16] [--kind jsonl] [--buffer 4096] [--bytes] [--json FILE]

The documents are those of `benchmarks.data`, in rows of 512 tokens of nano's tokenizer; with `--bytes` a token is a
byte, so that reading and packing take most of the time, in rows of 8,192. The text is written to a temporary directory
(set TMPDIR to a disk with space for it) and deleted at the end.
"""

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, Parser, machine, output_file, positive, run_as_script, write_json

PARQUET_DOCUMENTS = 20_000
"""In a row group."""
RUN = """
import hashlib, json, sys, time
from pathlib import Path
import numpy
from transformers import AutoTokenizer
import subquad
from benchmarks.common import peak_rss
from subquad.config import Data
from subquad.data import StreamedDataset, encoding, token_rows
source, buffer, characters, seq_len = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
position = Path(sys.argv[5])
if seq_len > 512:
    join = lambda texts: b"".join(b"\\0" + text.encode() for text in texts)
    encoding.Encoder.encode = lambda self, texts: numpy.frombuffer(join(texts), numpy.uint8).astype(numpy.uint32)
tokenizer = AutoTokenizer.from_pretrained(Path(subquad.__file__).parent / "nano")
data = Data(source=source, validation="python-stdlib", seq_len=seq_len, shuffle_buffer=buffer)
beginning = token_rows(data, tokenizer, "train", limit=200_000)
length = len if seq_len > 512 else lambda ids: len(tokenizer.decode(ids))
per_row = sum(length(row["input_ids"]) for row in beginning) / len(beginning)
last, peaks = int(0.8 * characters / per_row), []
start = time.perf_counter()
rows = StreamedDataset(data, tokenizer, beginning)
if position.exists():
    rows.load_state([json.loads(position.read_text())])
else:
    for row in range(last):
        rows[row]
        if row % (last // 8) == last // 16:
            peaks.append(peak_rss())
    position.write_text(json.dumps(rows.state(last)))
rows[last]
seconds = time.perf_counter() - start
digest = hashlib.sha256(b"".join(rows[i]["input_ids"].numpy().tobytes() for i in range(last, last + 2 * buffer)))
print(json.dumps({"row": last, "seconds": seconds, "peaks": peaks, "rows": digest.hexdigest()}))
"""


def draw_documents(text: str, size: float, seed: int) -> Iterator[dict[str, str]]:
    """Pieces of the standard library, of `size` characters in all."""
    rng = random.Random(seed)
    while size > 0:
        start = rng.randrange(len(text) - 4000)
        piece = text[start : start + rng.randint(200, 4000)]
        size -= len(piece)
        yield {"text": piece}


def write_file(path: Path, documents: Iterator[dict[str, str]]) -> None:
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
            while batch := [document for document, _ in zip(documents, range(PARQUET_DOCUMENTS), strict=False)]:
                writer.write_table(pyarrow.Table.from_pylist(batch))
        return
    with gzip.open(path, "wt", compresslevel=1) if path.suffix == ".gz" else path.open("w") as file:
        file.writelines(json.dumps(document) + "\n" for document in documents)


def run(directory: Path, buffer: int, characters: float, seq_len: int) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SUBQUAD_CACHE": str(directory / "cache")}
    arguments = [str(directory / "text"), str(buffer), str(characters), str(seq_len)]
    done = subprocess.run(
        [sys.executable, "-c", RUN, *arguments, str(directory / "position.json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def main(argv: Sequence[str] | None = None) -> int:
    from subquad.data import documents

    parser = Parser("stream", __doc__)
    parser.add_argument("--gigabytes", type=positive, default=5)
    parser.add_argument("--files", type=int, default=16)
    parser.add_argument("--kind", choices=("jsonl", "jsonl.gz", "parquet"), default="jsonl")
    parser.add_argument("--buffer", type=int, default=4096)
    parser.add_argument("--bytes", action="store_true")
    parser.add_argument("--json", type=output_file, metavar="FILE")
    args = parser.parse_args(argv)
    text, characters = "\n".join(map(str, documents("python-stdlib", "all"))), 1e9 * args.gigabytes
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "text").mkdir()
        for k in range(args.files):
            path = directory / "text" / f"{k}.{args.kind}"
            write_file(path, draw_documents(text, characters / args.files, k))
        size = sum(path.stat().st_size for path in (directory / "text").iterdir())
        given = directory, args.buffer, characters, 8192 if args.bytes else 512
        whole, resumed = run(*given), run(*given)
    equal = whole.pop("rows") == resumed.pop("rows")
    print(f"{size / 1e9:.2f} GB in {args.files} files; {whole['row']:,} rows in {whole['seconds']:.0f} s")
    print("peak memory, MB:", " ".join(f"{peak / 1e6:.0f}" for peak in whole["peaks"]))
    print(f"resumed in {resumed['seconds']:.1f} s, {'equal' if equal else 'different'} rows")
    results = {
        "bytes": size,
        "files": args.files,
        "kind": args.kind,
        "tokens": "bytes" if args.bytes else "nano",
        "buffer": args.buffer,
    }
    write_json(args.json, {"machine": machine(), **results, "whole": whole, "resumed": resumed, "equal": equal})
    return 0 if equal else 1


if __name__ == "__main__":
    run_as_script(main)
