#!/usr/bin/env bash
# Build the wheel, with the CPU kernels made for this platform, and import every module of it that needs no engine, in
# a clean environment outside the repository.
set -euo pipefail
case ${1:-} in
  '') ;;
  -h | --help) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "wheel: arguments: expected none, got '$*'; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
root=$PWD
work=$(mktemp -d)
library=
trap 'rm -rf "$work" ${library:+"$library"}' EXIT
library=$(.venv/bin/python - <<'PYTHON'
from laguna_serve.kernels.sentinel_moe.build import SOURCES, make_prebuilt
print(make_prebuilt(SOURCES))
PYTHON
)
platform=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_platform().replace("-", "_").replace(".", "_"))')
.venv/bin/python -m build --wheel --no-isolation -C--build-option="bdist_wheel --plat-name=$platform" --outdir "$work" . >"$work/build.log" 2>&1 || { cat "$work/build.log" >&2; exit 1; }
.venv/bin/python -m venv "$work/venv"
"$work/venv/bin/python" -m pip --disable-pip-version-check install --quiet --only-binary :all: \
  -c "$root/scripts/requirements/cpu.lock" "$(echo "$work"/*.whl)[bench,evals,tracing]" >"$work/pip.log" 2>&1 || { cat "$work/pip.log" >&2; exit 1; }
modules=$(find . -path './[!.]*/*.py' ! -path './tests/*' ! -path './build/*' ! -path './docs/*' ! -path './examples/*' ! -path './evals/spec_rl/*' | wc -l)
cd "$work"
venv/bin/python - "$modules" <<'PYTHON'
"""Every module of the repository is in the wheel, and what runs beside an engine imports without one."""
import importlib
import importlib.metadata
import sys

files = [f for f in importlib.metadata.files("laguna-serve") or [] if f.suffix == ".py"]
assert len(files) == int(sys.argv[1]), f"wheel: expected {sys.argv[1]} modules, got {len(files)}; see pyproject.toml"
names = sorted(".".join(f.with_suffix("").parts) for f in files)
light = [n for n in names if n.split(".")[1] in {"bench", "evals", "serving"} or n == "laguna_serve.plugins.register"]
light = [n for n in light if n not in {f"laguna_serve.bench.{m}" for m in ("diffusion.arms", "linear.timing", "moe", "moe_layer.layers", "moe_layer.timing", "moe_tuning.__main__", "moe_tuning.measure", "moe_tuning.space")}]  # they compute
ray = {f"laguna_serve.{m}" for m in ("bench.cluster.__main__", "bench.cluster.local", "bench.cluster.phases", "serving.ray_app")}
ray |= {f"laguna_serve.serving.cluster.{m}" for m in ("ingress", "keeper", "replica")}
light = [n for n in light if n not in ray]
sources = {f.name for f in importlib.metadata.files("laguna-serve") or []}
assert {"driver.cpp", "kernels.hpp", "product.cpp", "tiles.cpp", "amx.hpp"} <= sources, "wheel: expected the CPU kernels' source, got none; see package-data in pyproject.toml"
assert any(name.endswith(".so") for name in sources), "wheel: expected the CPU kernels' library, got none; see package-data in pyproject.toml"
assert "py.typed" in sources, "wheel: expected py.typed, got none; see package-data in pyproject.toml"
for name in light:
    importlib.import_module(name)
assert "laguna_serve" in importlib.metadata.entry_points(group="vllm.general_plugins").names
print(f"wheel: {len(names)} modules, {len(light)} imported without an engine")
PYTHON
venv/bin/laguna --help >/dev/null
