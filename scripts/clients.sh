#!/usr/bin/env bash
# Run SDKs and coding agents against `laguna serve` on the toy, and report what works (see --help).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
bash scripts/client_env.sh clients
exec .venv/bin/python -m laguna_serve.scripts.clients.run "$@"
