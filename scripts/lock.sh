#!/usr/bin/env bash
# Resolve scripts/requirements/*.in into the locked lists again.  Needs uv (https://docs.astral.sh/uv), and an index or
# folder that offers the CPU build of torch (pass it on: bash scripts/lock.sh --find-links FOLDER).
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/requirements"
# Beside the lists, which stay as they are until all are resolved; uv keeps the versions that a list has.
work=$(mktemp -d .lock.XXXXXX)
trap 'rm -rf "$work"' EXIT
cp ./*.lock "$work"
given=("$@")
resolve() {
    local plain=(--no-annotate --no-header --quiet --no-python-downloads)
    uv pip compile "$1.in" "${plain[@]}" "${@:2}" -o "$work/$1.lock" "${given[@]}"
}
resolve cpu --universal --python-version 3.11 --excludes excluded.txt
resolve evals --universal --python-version 3.11 --excludes evals-excluded.txt
resolve spec_rl --universal --python-version 3.11
resolve gpu --python-platform x86_64-manylinux_2_28 --python-version 3.12
resolve clients --universal --python-version 3.11
resolve deploy --universal --python-version 3.11
resolve docs --universal --python-version 3.11
# What it needs besides is locked for .venv, over which it lies.
resolve train --universal --python-version 3.11 --no-deps
# Neither does this list have what cpu.lock pins.
resolve ray --universal --python-version 3.11 --constraints "$work/cpu.lock"
awk -F== 'NR == FNR { pinned[$1]; next } !($1 in pinned)' "$work/cpu.lock" "$work/ray.lock" >"$work/ray.rest"
mv "$work/ray.rest" "$work/ray.lock"
mv "$work"/*.lock .
npm install --prefix ../clients --package-lock-only --no-audit --no-fund
