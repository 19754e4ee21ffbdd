#!/usr/bin/env bash
# Format, lint and type checks, as CI runs them.
set -euo pipefail
case ${1:-} in
  '') ;;
  -h | --help) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "lint: arguments: expected none, got '$*'; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
.venv/bin/ruff format --check .
.venv/bin/ruff check .
# mypy does not follow the mapping of folders to packages that setuptools makes; links give it the same view.
mkdir -p .typing/laguna_serve
for folder in bench evals kernels plugins scripts serving; do
  if [ -d "$folder" ]; then ln -sfn "../../$folder" ".typing/laguna_serve/$folder"; fi
done
.venv/bin/mypy -p laguna_serve
