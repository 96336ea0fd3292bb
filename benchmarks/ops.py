"""Time the ops beside every peer that is installed: a table on the screen, JSON beside it, RESULTS.md if asked.

python -m benchmarks.ops [--sizes 512x8,2048,8192,16384] [--json FILE] [--results benchmarks/RESULTS.md]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from subquad.ops import bench


def parse(text: str) -> list[bench.Size]:
    """ "512x8,2048": T, or T x B."""
    sizes = []
    for part in text.split(","):
        T, _, B = part.partition("x")
        sizes.append(bench.Size(int(T), int(B or 1)))
    return sizes


def markdown(report: dict, tables: list[tuple[str, str]]) -> str:
    described = ", ".join(f"{name} {value}" for name, value in report["machine"].items())
    parts = ["# The ops beside their peers", "", "Written by `python -m benchmarks.ops --results`.", "", described, ""]
    for title, text in tables:
        parts += [f"## {title}", "", "```", text, "```", ""]
    if report["missing"]:
        parts += ["Not measured:", ""] + [f"- {name}: {why}" for name, why in sorted(report["missing"].items())] + [""]
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=parse, default="512,512x8,2048,8192,16384", help="T or TxB, comma-separated")
    parser.add_argument("--only", help="names of kinds and peers, comma-separated")
    parser.add_argument("--seconds", type=float, default=60.0, help="at most this long a size")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, a process for each kind and size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    names = options.only.split(",") if options.only else None
    report: dict = {"machine": bench.machine(), "matmul_rate": bench.matmul_rate(), "rows": [], "missing": {}}
    tables = []
    print(report["machine"], f"{report['matmul_rate'] / 1e9:.0f} Gflop/s in 64 x 64 products", flush=True)
    for size in options.sizes:
        # Peers that take half a minute a call at 16,384 tokens would be all that is measured there.
        at_once = names if names or size.T <= 8192 else list(bench.kinds())
        rows, missing = bench.measure(size, at_once, options.seconds)
        report["rows"] += [row.as_dict() for row in rows]
        report["missing"] |= missing
        tables.append((f"Forward and backward, T = {size.T}, B = {size.B}", bench.table(rows)))
        print("", *tables[-1], sep="\n", flush=True)
    report["decode_microseconds"] = bench.measure_decode(bench.Size())
    tables.append(("One token", "\n".join(f"{n:26s} {t:9.1f} us" for n, t in report["decode_microseconds"].items())))
    print("", *tables[-1], sep="\n", flush=True)
    if not options.no_memory:
        lengths = sorted({size.T for size in options.sizes if size.B == 1})
        chosen = [n for n in bench.kinds() if names is None or n in names]
        report["peak_bytes"] = {n: {T: bench.peak_memory(n, bench.Size(T)) for T in lengths} for n in chosen}
        lines = [
            f"{n:14s}" + "".join(f"  T = {T}: {b / 2**20:.0f} MB" for T, b in by.items())
            for n, by in report["peak_bytes"].items()
        ]
        tables.append(("Peak memory of one call", "\n".join(lines)))
        print("", *tables[-1], sep="\n", flush=True)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.results:
        options.results.write_text(markdown(report, tables))


if __name__ == "__main__":
    main()
