#!/usr/bin/env bash
# Build the wheel, install it with its dependencies into a fresh environment outside the
# checkout, and run what a newcomer would. PYTHON: an interpreter that has `build`.
set -euo pipefail
python=$(cd "$(dirname "${PYTHON:-python3}")" 2>/dev/null && pwd)/$(basename "${PYTHON:-python3}")
[ -x "$python" ] || python=$(command -v python3)
cd "$(dirname "$0")/../.."
there=$(mktemp -d)
trap 'rm -rf "$there"' EXIT
"$python" -m build --quiet --wheel --outdir "$there/dist" .
"$python" -m venv "$there/venv"
"$there/venv/bin/python" -m pip install -q --disable-pip-version-check "$there"/dist/*.whl
cd "$there"
unset PYTHONPATH
venv/bin/orchestrator -m training.epochs=2 seed=0,1
venv/bin/python -m orchestrator training.epochs=2 seed=0 | tee again.txt
grep -q '1 of 1 done already' again.txt
venv/bin/orchestrator-aggregate outputs/ | tee table.txt
grep -q epochs table.txt
test -s outputs/results.parquet
venv/bin/orchestrator-status outputs/
echo "The wheel works outside the checkout."
