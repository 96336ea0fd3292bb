"""Time the ops beside every peer that is installed: tables on the screen, JSON and RESULTS.md if asked.

python -m benchmarks.ops [--sizes 512x8,2048,8192,16384] [--json FILE] [--results benchmarks/RESULTS.md]

`subquad bench ops` is the same without --results.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks import ops_report as report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=report.parse_sizes, default=report.SIZES, help="T or TxB, comma-separated")
    parser.add_argument("--only", type=report.parse_names, help="names of kinds and peers, comma-separated")
    parser.add_argument("--seconds", type=float, default=report.SECONDS, help="at most this long a size")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory, a process for each kind and size")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    done = report.run(
        options.sizes, options.only, options.seconds, not options.no_memory, lambda t: print(t, flush=True)
    )
    if options.json:
        options.json.write_text(json.dumps(done.as_dict(), indent=1) + "\n")
    if options.results:
        options.results.write_text(done.markdown())


if __name__ == "__main__":
    main()
