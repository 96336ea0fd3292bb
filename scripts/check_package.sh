#!/usr/bin/env bash
# Builds the source distribution and the wheel, checks them, and runs the wheel outside of the clone, in a new environment
# for each Python:
#
#     scripts/check_package.sh python3.11 python3.12 python3.13
#
# Each environment gets torch first, then the wheel and what it requires.
set -euo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m build --outdir "$work/dist" . > "$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }
.venv/bin/python -m twine check --strict "$work"/dist/*
for python in "$@"; do
    "$python" -m venv "$work/env"
    "$work/env/bin/python" -m pip install --quiet "torch>=2.11,<2.14"
    "$work/env/bin/python" -m pip install --quiet "$work"/dist/*.whl
    (
        cd "$work"
        bin="$work/env/bin"
        "$bin/python" -c "import subquad, sys; print(sys.version.split()[0], subquad.__version__, subquad.__file__)"
        "$bin/subquad" mixers > /dev/null
        "$bin/subquad" recipe nano > /dev/null
        "$bin/subquad" linearize nano --mixer gla --output student
        "$bin/subquad" distill small-budget --output trained --set stages.matrix=null \
            --set stages.hidden.tokens=1024 --set stages.end_to_end.tokens=1024 --set evaluation.eval_tokens=1024 \
            --set student.calibration_tokens=null
        "$bin/subquad" generate trained "def main():" --tokens 8
        head -c 20000 "$bin/../lib/"python*/site-packages/torch/functional.py > text.txt
        "$bin/subquad" eval trained --suite language --corpus text.txt > /dev/null
    )
    rm -rf "$work/env" "$work/student" "$work/trained"
done
