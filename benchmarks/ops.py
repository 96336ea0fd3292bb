"""Times the operators and every installed baseline: forward and backward, a decoded token, and peak memory.

    python -m benchmarks.ops [--sizes 512x8,2048,8192,16384] [--json FILE] [--results benchmarks/RESULTS.md]

Tables are printed as soon as they are complete.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

from benchmarks import ops_timing
from benchmarks.common import Parser, in_words, machine, output_file, positive, run_as_script, write_json
from benchmarks.ops_timing import DecodeTiming, Size, Timing
from subquad.cli.parser import split_list

SIZES = "512,512x8,2048,8192,16384"
MAX_BASELINE_LENGTH = 8192  # on longer sequences some baselines take half a minute per call


@dataclass
class Report:
    """All results of a run, and the tables made of them as (title, text)."""

    machine: dict
    matmul_rate: float
    results: list[Timing] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    decode: list[DecodeTiming] = field(default_factory=list)
    peak_bytes: dict[str, dict[int, int]] = field(default_factory=dict)
    tables: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "tables"}

    def rate(self) -> str:
        return f"{self.matmul_rate / 1e9:.0f} Gflop/s in batched 64 x 64 products"

    def markdown(self) -> str:
        lines = ["# Operator benchmarks", "", "Written by `python -m benchmarks.ops --results`.", ""]
        lines += [f"{in_words(self.machine)}; {self.rate()}. float32, 9 heads of 64.", ""]
        for title, text in self.tables:
            lines += [f"## {title}", "", "```text", text, "```", ""]
        if self.missing:
            lines += ["Not measured:", "", *(f"- {name}: {why}" for name, why in sorted(self.missing.items())), ""]
        return "\n".join(lines)


def parse_sizes(text: str) -> list[Size]:
    """Parses comma-separated T or T x B, such as "512x8,2048"."""
    sizes = []
    for part in text.split(","):
        T, times, B = part.strip().partition("x")
        if not T.isdecimal() or (times and not B.isdecimal()) or int(T) < 1 or int(B or 1) < 1:
            raise argparse.ArgumentTypeError(f"got {part!r}, expected tokens, or tokens x batch, such as 2048,512x8")
        sizes.append(Size(int(T), int(B or 1)))
    return sizes


def parse_names(text: str) -> list[str]:
    """Parses comma-separated names of variants and baselines."""
    found, missing = ops_timing.baselines()
    known = [*ops_timing.variants(), *found, *missing]
    if unknown := [name for name in split_list(text) if name not in known]:
        raise argparse.ArgumentTypeError(f"got {unknown[0]!r}, expected names among {', '.join(known)}")
    return split_list(text)


def run(
    sizes: list[Size],
    only: list[str] | None = None,
    seconds: float = 60.0,
    memory: bool = True,
    show: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measures at most about `seconds` per size; passes each table to `show` as soon as it is complete."""
    report = Report(machine(), ops_timing.matmul_rate())

    def add(title: str, text: str) -> None:
        report.tables.append((title, text))
        show(f"\n{title}\n{text}")

    show(in_words(report.machine))
    show(report.rate())
    variants = [name for name in ops_timing.variants() if only is None or name in only]
    for size in sizes:
        results, missing = ops_timing.measure(size, only if size.T <= MAX_BASELINE_LENGTH else variants, seconds)
        report.results += results
        report.missing |= missing
        add(f"Forward and backward, T = {size.T}, B = {size.B}", timing_table(results))
    lengths = sorted({size.T for size in sizes if size.B == 1})
    if len(lengths) > 1 and variants:
        add(
            "Microseconds per token, and relative to T = 2048",
            table_by_length(times_per_token(report.results, variants)),
        )
    report.decode = ops_timing.measure_decode(Size())
    add("One decoded token", decode_table(report.decode))
    if memory and variants and lengths:
        report.peak_bytes = {n: {T: ops_timing.peak_memory(n, Size(T)) for T in lengths} for n in variants}
        kilobytes = {n: {T: b / T / 1024 for T, b in by.items()} for n, by in report.peak_bytes.items()}
        add("Peak memory of a call, KB per token, and relative to T = 2048", table_by_length(kilobytes))
    return report


def times_per_token(results: list[Timing], variants: list[str]) -> dict[str, dict[int, float]]:
    """Microseconds per token by variant and T, for batches of one."""
    return {
        variant: {r.size.T: 1e3 * r.milliseconds / r.size.T for r in results if r.name == variant and r.size.B == 1}
        for variant in variants
    }


def timing_table(results: list[Timing]) -> str:
    """The results of one size, fastest first, with speedups over SDPA where it was measured."""
    sdpa = next((r.milliseconds for r in results if r.name == "sdpa"), None)
    lines = [f"{'':26s} {'ms':>9s} {'min':>9s} {'x SDPA':>8s} {'of matmul rate':>15s}"]
    for r in sorted(results, key=lambda r: r.milliseconds):
        speedup = f"{sdpa / r.milliseconds:8.2f}" if sdpa else " " * 8
        share = "" if r.share_of_matmul_rate is None else f"{r.share_of_matmul_rate:14.0%}"
        lines.append(f"{r.name:26s} {r.milliseconds:9.2f} {r.fastest:9.2f} {speedup} {share}")
    return "\n".join(lines)


def table_by_length(values: dict[str, dict[int, float]]) -> str:
    """One line per variant, one column per T; in brackets the ratio to T = 2048, or else to the shortest T."""
    lengths = sorted({T for by in values.values() for T in by})
    base = 2048 if 2048 in lengths else lengths[0]
    lines = [f"{'':14s}" + "".join(f"{f'T = {T}':>18s}" for T in lengths)]
    for variant, by in values.items():
        cells = (f"{by[T]:9.2f} ({by[T] / by[base]:5.2f})" if T in by and by.get(base) else "" for T in lengths)
        lines.append(f"{variant:14s}" + "".join(f"{cell:>18s}" for cell in cells))
    return "\n".join(lines)


def decode_table(timings: list[DecodeTiming]) -> str:
    lines = [f"{'':20s} {'us':>8s} {'of which launches':>18s} {'x SDPA':>8s}"]
    for timing in timings:
        launches = "" if timing.launches is None else f"{timing.launches:.1f}"
        lines.append(f"{timing.name:20s} {timing.microseconds:8.1f} {launches:>18s} {timing.speedup:8.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser("ops", __doc__)
    parser.add_argument("--sizes", type=parse_sizes, default=SIZES, metavar="LIST", help="tokens, or tokens x batch")
    parser.add_argument(
        "--only", type=parse_names, metavar="LIST", help="names of variants and baselines; default: all"
    )
    parser.add_argument("--seconds", type=positive, default=60.0, help="per size, at most about")
    parser.add_argument("--no-memory", action="store_true", help="skip peak memory: one process per variant and size")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write all results there")
    parser.add_argument("--results", type=output_file, metavar="FILE", help="write the tables there, as Markdown")
    args = parser.parse_args(argv)
    report = run(args.sizes, args.only, args.seconds, not args.no_memory, lambda text: print(text, flush=True))
    write_json(args.json, report.as_dict())
    if args.results:
        args.results.write_text(report.markdown())
    return 0


if __name__ == "__main__":
    run_as_script(main)
