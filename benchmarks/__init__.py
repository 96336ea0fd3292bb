"""Speed and memory against peers, each in one run: `python -m benchmarks.ops`."""
