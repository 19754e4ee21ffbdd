#!/usr/bin/env bash
# Make .venv-evals with the locked harnesses of the standard suites (lm-evaluation-harness, evalplus); does nothing when
# that is done already.  Apart from .venv: they only speak HTTP to an endpoint, and pin other releases than the engine.
#
#   bash scripts/evals_env.sh
#   PYTHON=/path/to/python3.12 bash scripts/evals_env.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'evals_env: %s\n' "$*" >&2; exit 2; }

lock=scripts/requirements/evals.lock
wanted=$(sha256sum <"$lock" | cut -d' ' -f1)
[ "$(cat .venv-evals/.stamp 2>/dev/null)" = "$wanted" ] && exit 0

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python: expected 3.11 or newer, got $("$python" --version 2>&1 || true); name one with PYTHON=/path/to/python3"

free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ "$free_kib" -ge $((1024 * 1024)) ] || fail "disk: expected 1 GiB free in $PWD, got $((free_kib / 1024)) MiB; make room"

rm -rf .venv-evals
said=$("$python" -m venv .venv-evals 2>&1) ||
  fail "venv: $("$python" --version) cannot make one: ${said##*$'\n'}; install its venv package (python3-venv on Debian)"
# The folder ignores itself: no tool that walks the checkout takes it for the project's own.
echo '*' >.venv-evals/.gitignore

log=.venv-evals/install.log
echo "evals_env: installing $(grep -c == "$lock") locked packages (log in $log)" >&2
if ! .venv-evals/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile -r "$lock" >"$log" 2>&1; then
  grep '^ERROR' "$log" | tail -n 3 >&2 || tail -n 5 "$log" >&2
  fail "pip could not install $lock; the whole log is in $log"
fi
echo "$wanted" >.venv-evals/.stamp
