"""What `subquad bench ops` and `python -m benchmarks.ops` report: tables as text, Markdown and JSON. Prints nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

from benchmarks import ops_timing as bench
from benchmarks.ops_timing import Size

SIZES = "512,512x8,2048,8192,16384"
SECONDS = 60.0
LONGEST_WITH_PEERS = 8192  # beyond, some peers take half a minute a call and would be all that is measured


@dataclass
class Report:
    """All figures of a run, and the tables made of them, (title, text) each."""

    machine: dict
    matmul_rate: float
    rows: list[bench.Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    decode: list[bench.Token] = field(default_factory=list)
    peak_bytes: dict[str, dict[int, int]] = field(default_factory=dict)
    tables: list[tuple[str, str]] = field(default_factory=list)

    def as_dict(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "tables"}

    def markdown(self) -> str:
        described = ", ".join(f"{name} {value}" for name, value in self.machine.items())
        rate = f"{self.matmul_rate / 1e9:.0f} Gflop/s in batched 64 x 64 products"
        parts = ["# The ops beside their peers", "", "Written by `python -m benchmarks.ops --results`.", ""]
        parts += [f"{described}; {rate}. float32, 9 heads of 64.", ""]
        for title, text in self.tables:
            parts += [f"## {title}", "", "```text", text, "```", ""]
        if self.missing:
            parts += ["Not measured:", "", *(f"- {name}: {why}" for name, why in sorted(self.missing.items())), ""]
        return "\n".join(parts)


def parse_sizes(text: str) -> list[Size]:
    """Of "512x8,2048": T or T x B, comma-separated; a ValueError says what was wrong."""
    sizes = []
    for part in text.split(","):
        T, times, B = part.strip().partition("x")
        if not T.isdecimal() or (times and not B.isdecimal()) or int(T) < 1 or int(B or 1) < 1:
            raise ValueError(f"--sizes: got {part!r}, expected tokens, or tokens x batch, such as 2048,512x8")
        sizes.append(Size(int(T), int(B or 1)))
    return sizes


def parse_names(text: str | None) -> list[str] | None:
    """Kinds and peers, comma-separated, in the order of the tables; a ValueError lists them all."""
    if text is None:
        return None
    found, missing = bench.baselines()
    known = [*bench.variants(), *found, *missing]
    names = [name.strip() for name in text.split(",")]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--only: got {unknown[0]!r}, expected names among {', '.join(known)}")
    return names


def run(
    sizes: list[Size],
    names: list[str] | None = None,
    seconds: float = SECONDS,
    memory: bool = True,
    say: Callable[[str], object] = lambda text: None,
) -> Report:
    """Measure everything, at most about `seconds` a size; each table goes to `say` as soon as it is there."""
    report = Report(bench.machine(), bench.matmul_rate())

    def add(title: str, text: str) -> None:
        report.tables.append((title, text))
        say(f"\n{title}\n{text}")

    say(", ".join(f"{name} {value}" for name, value in report.machine.items()))
    say(f"{report.matmul_rate / 1e9:.0f} Gflop/s in batched 64 x 64 products")
    kinds = [name for name in bench.variants() if names is None or name in names]
    for size in sizes:
        rows, missing = bench.measure(size, names if size.T <= LONGEST_WITH_PEERS else kinds, seconds)
        report.rows += rows
        report.missing |= missing
        add(f"Forward and backward, T = {size.T}, B = {size.B}", bench.table(rows))
    lengths = sorted({size.T for size in sizes if size.B == 1})
    if len(lengths) > 1 and kinds:
        add("Microseconds a token, and times that at 2,048", by_length(times_per_token(report.rows, kinds)))
    report.decode = bench.measure_decode(Size())
    add("One decoded token", decode_table(report.decode))
    if memory and kinds and lengths:
        report.peak_bytes = {n: {T: bench.peak_memory(n, Size(T)) for T in lengths} for n in kinds}
        kilobytes = {n: {T: b / T / 1024 for T, b in by.items()} for n, by in report.peak_bytes.items()}
        add("Peak memory of a call, KB a token, and times that at 2,048", by_length(kilobytes))
    return report


def times_per_token(rows: list[bench.Row], kinds: list[str]) -> dict[str, dict[int, float]]:
    """Microseconds by kind and T, for batches of one."""
    return {
        kind: {row.size.T: 1e3 * row.milliseconds / row.size.T for row in rows if row.name == kind and row.size.B == 1}
        for kind in kinds
    }


def by_length(figures: dict[str, dict[int, float]]) -> str:
    """A line a kind, a column a length; in brackets the ratio to 2,048 tokens, or without them to the shortest."""
    lengths = sorted({T for by in figures.values() for T in by})
    base = 2048 if 2048 in lengths else lengths[0]
    lines = [f"{'':14s}" + "".join(f"{f'T = {T}':>18s}" for T in lengths)]
    for kind, by in figures.items():
        cells = (f"{by[T]:9.2f} ({by[T] / by[base]:5.2f})" if T in by and by.get(base) else "" for T in lengths)
        lines.append(f"{kind:14s}" + "".join(f"{cell:>18s}" for cell in cells))
    return "\n".join(lines)


def decode_table(tokens: list[bench.Token]) -> str:
    lines = [f"{'':20s} {'us':>8s} {'of which launches':>18s} {'x SDPA':>8s}"]
    for token in tokens:
        launches = "" if token.launches is None else f"{token.launches:.1f}"
        lines.append(f"{token.name:20s} {token.microseconds:8.1f} {launches:>18s} {token.ratio:8.2f}")
    return "\n".join(lines)
