#!/usr/bin/env bash
# Runs the quick tests of the core with the lowest version of each dependency that pyproject.toml allows:
#
#     scripts/check_lowest.sh python3.11 [torch==2.11.*]
#
# torch is the newest that is allowed unless a version is given: of old versions not every index has a build for CPUs.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$1
torch=${2:-"torch>=2.11,<2.14"}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$python" -m venv "$work/env"
bin="$work/env/bin"
"$bin/python" -m pip install --quiet "$torch" packaging
"$bin/python" - > "$work/lowest.txt" <<'PYTHON'
import tomllib
from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
extras = project["optional-dependencies"]
for text in [*project["dependencies"], *extras["report"], *extras["export"], *extras["lora"]]:
    requirement = Requirement(text)
    lowest = [bound.version for bound in requirement.specifier if bound.operator == ">="]
    if lowest and requirement.name != "torch":
        print(f"{requirement.name}=={lowest[0]}")
PYTHON
"$bin/python" -m pip install --quiet --constraint "$work/lowest.txt" ".[report,export,lora]"
"$bin/python" -m pip install --quiet "pytest>=8" "pytest-xdist>=3.6" "hypothesis>=6.100"
"$bin/python" -m pip list --format freeze | grep -i -f <(sed 's/==.*/==/' "$work/lowest.txt")
"$bin/python" -m pytest -m "not slow" -n 2 tests/config tests/data tests/modeling/test_linearize.py tests/test_cli.py
