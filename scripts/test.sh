#!/usr/bin/env bash
# Set up, then every test, with those that start a real vLLM engine.
#
#   bash scripts/test.sh
#   bash scripts/test.sh -m 'not vllm'         # any flag of pytest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
exec .venv/bin/python -m pytest "$@"
