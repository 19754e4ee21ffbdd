#!/usr/bin/env bash
# Build the wheel and import every module of it that needs no engine, in a clean environment outside the repository.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
root=$PWD
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
.venv/bin/python -m build --wheel --no-isolation --outdir "$work" . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --only-binary :all: \
  -c "$root/scripts/requirements/cpu.lock" "$work"/*.whl >"$work/pip.log" 2>&1 || { cat "$work/pip.log" >&2; exit 1; }
cd "$work"
venv/bin/python - <<'PYTHON'
"""Every declared package is in the wheel, and what runs beside an engine imports without one."""
import importlib
import importlib.metadata
import pkgutil

import laguna_serve

names = [m.name for m in pkgutil.walk_packages(laguna_serve.__path__, "laguna_serve.")]
light = [n for n in names if n.split(".")[1] in {"bench", "serving"} or n == "laguna_serve.plugins.register"]
for name in light:
    importlib.import_module(name)
entry_points = importlib.metadata.entry_points(group="vllm.general_plugins")
assert "laguna_serve" in entry_points.names, entry_points
print(f"wheel: {len(names)} modules found, {len(light)} imported without an engine")
PYTHON
venv/bin/laguna --help >/dev/null
