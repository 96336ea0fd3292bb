"""Benchmarks of speed and memory. Each is a module `benchmarks.NAME` with `main(argv) -> int`, run by
`python -m benchmarks.NAME` or `subquad bench NAME`; `--help` lists its options."""
