#!/usr/bin/env bash
# Resolve scripts/requirements/*.in into the locked lists again.  Needs uv (https://docs.astral.sh/uv), and an index or
# folder that offers the CPU build of torch (pass it on: bash scripts/lock.sh --find-links FOLDER).
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/requirements"
plain=(--no-annotate --no-header --quiet --no-python-downloads)
uv pip compile cpu.in "${plain[@]}" --universal --python-version 3.11 --excludes excluded.txt -o cpu.lock "$@"
uv pip compile evals.in "${plain[@]}" --universal --python-version 3.11 --excludes evals-excluded.txt -o evals.lock "$@"
uv pip compile spec_rl.in "${plain[@]}" --universal --python-version 3.11 -o spec_rl.lock "$@"
uv pip compile gpu.in "${plain[@]}" --python-platform x86_64-manylinux_2_28 --python-version 3.12 -o gpu.lock "$@"
uv pip compile clients.in "${plain[@]}" --universal --python-version 3.11 -o clients.lock "$@"
uv pip compile deploy.in "${plain[@]}" --universal --python-version 3.11 -o deploy.lock "$@"
uv pip compile docs.in "${plain[@]}" --universal --python-version 3.11 -o docs.lock "$@"
# What it needs besides is locked for .venv, over which it lies.
uv pip compile train.in "${plain[@]}" --universal --python-version 3.11 --no-deps -o train.lock "$@"
# Neither does this list have what cpu.lock pins.
uv pip compile ray.in "${plain[@]}" --universal --python-version 3.11 --constraints cpu.lock -o ray.lock "$@"
awk -F== 'NR == FNR { pinned[$1]; next } !($1 in pinned)' cpu.lock ray.lock >ray.rest
mv ray.rest ray.lock
npm install --prefix ../clients --package-lock-only --no-audit --no-fund
