#!/usr/bin/env bash
# Set up, then every test, with those that start a real vLLM engine.
#
#   bash scripts/test.sh
#   bash scripts/test.sh -m fast               # most tests, in about two minutes
#   bash scripts/test.sh -m 'not vllm'         # any flag of pytest
#   bash scripts/test.sh -n 0 -x -k weights    # in one process
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
if [[ " $* " != *' -m fast '* ]]; then
  for name in evals spec_rl train ray; do bash scripts/client_env.sh "$name"; done
fi
# The many short programs that tests start compile what they import once, not each time.
unset PYTHONDONTWRITEBYTECODE
# Four at a time, as tests wait more than they compute.  A thread that waits for another one must sleep, not spin on
# the core that it waits for.
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0
# By file, as a file's tests share what they start; in the order of collection, as the longest come first
# (tests/conftest.py).
exec .venv/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder --durations=25 "$@"
