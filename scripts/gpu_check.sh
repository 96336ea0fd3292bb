#!/usr/bin/env bash
# Checks Subquad on the accelerator of this machine, in at most eight minutes: the tests on it, then `benchmarks.gpu`.
#
#     scripts/gpu_check.sh [OUTPUT_DIR] [options of benchmarks.gpu, such as --teacher smollm2-135m --seconds 300]
#
# It needs a Python with PyTorch and this package's dependencies, in $PYTHON (default: python3), and writes the device's
# tables to OUTPUT_DIR (default: results/gpu). `--device cpu --seconds 60` takes the same path on a machine without one.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
output=${1:-results/gpu}
shift || true
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" -m pytest tests/gpu tests/ops/test_ops_fla.py -q -m "not slow" -p no:cacheprovider
tests=$?
"$python" -m benchmarks.gpu --output "$output" "$@"
benchmark=$?
exit $((tests || benchmark))
