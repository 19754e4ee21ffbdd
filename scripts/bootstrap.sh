#!/usr/bin/env bash
# Make .venv with the locked stack and the project in it; does nothing when that is done already.
#
#   bash scripts/bootstrap.sh            # CPU, or GPU where nvidia-smi answers
#   LAGUNA_STACK=cpu bash scripts/bootstrap.sh
#   PYTHON=/path/to/python3.12 bash scripts/bootstrap.sh
set -euo pipefail
case ${1:-} in
  '') ;;
  -h | --help) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "bootstrap: arguments: expected none, got '$*'; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'bootstrap: %s\n' "$*" >&2; exit 2; }

if [ -z "${LAGUNA_STACK:-}" ]; then
  if nvidia-smi >/dev/null 2>&1; then LAGUNA_STACK=gpu; else LAGUNA_STACK=cpu; fi
fi
lock="scripts/requirements/$LAGUNA_STACK.lock"
[ -f "$lock" ] || fail "LAGUNA_STACK: expected cpu or gpu, got '$LAGUNA_STACK'"
case $LAGUNA_STACK in cpu) needed_gib=5 ;; gpu) needed_gib=14 ;; esac

wanted=$(cat "$lock" pyproject.toml | sha256sum | cut -d' ' -f1)
[ "$(cat .venv/.stamp 2>/dev/null)" = "$wanted" ] && exit 0

python=''
candidates=(python3.12 python3.11 python3.13 python3)
[ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
for candidate in "${candidates[@]}"; do
  if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$candidate; break; fi
done
# The CPU build of torch may be at hand for one Python only; the machine's own is the likelier one.
if [ -z "${PYTHON:-}" ] && python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=python3; fi
[ -n "$python" ] || fail "Python: expected 3.11 or newer, got ${PYTHON:-$(python3 --version 2>&1)}; install it, or name it with PYTHON=/path/to/python3"

free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ "$free_kib" -ge $((needed_gib * 1024 * 1024)) ] ||
  fail "disk: expected ${needed_gib} GiB free in $PWD for the $LAGUNA_STACK stack, got $((free_kib / 1024 / 1024)) GiB; make room"

if ! .venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
  rm -rf .venv
  "$python" -m venv .venv >.venv-error 2>&1 ||
    fail "venv: $("$python" --version) cannot make one: $(tail -n 1 .venv-error); install its venv package (python3-venv on Debian)"
  rm -f .venv-error
fi
rm -f .venv/.stamp

log=.venv/bootstrap.log
echo "bootstrap: installing $(grep -c == "$lock") locked packages for a ${LAGUNA_STACK^^} (a minute or two; log in $log)" >&2
if ! bash scripts/requirements/install.sh .venv/bin/python "$lock" >"$log" 2>&1; then
  grep '^ERROR' "$log" | tail -n 3 >&2 || tail -n 5 "$log" >&2
  if grep -q 'No matching distribution found for torch' "$log"; then
    fail "torch: no wheel of $(grep '^torch==' "$lock") for $(.venv/bin/python --version) on the package indexes that pip is" \
      "configured with; PyTorch's own CPU wheel index offers it (pytorch.org, Get Started, Linux, Pip, CPU): add that" \
      "index to pip's configuration and run this again"
  fi
  if grep -q 'No space left' "$log"; then fail "disk: it filled up while installing; make room and run this again"; fi
  fail "pip could not install $lock; the whole log is in $log"
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check install --quiet --no-deps --no-compile)
"${pip[@]}" --no-build-isolation --editable . >>"$log" 2>&1 || fail "pip could not install the project; see $log"
# Byte code once and on every core: vLLM starts four processes, which would each compile their imports otherwise.
# But for tests and for models of others, of which there are hundreds.  It fails on the packages' own templates, which
# are never imported.
engine='__init__|adapters|config|interfaces|interfaces_base|laguna|llama|qwen3|qwen3_dflash|registry|utils|vision'
others="/vllm/model_executor/models/(?!($engine)\.py)|/transformers/models/(?!__init__|(auto|laguna|llama|qwen[23])/)"
rare="/tests?/|/(pandas|pip|setuptools)/|$others"
.venv/bin/python -m compileall -q -j 0 -x "$rare" .venv/lib >>"$log" 2>&1 || true
echo "$wanted" >.venv/.stamp
