#!/usr/bin/env bash
# Run SDKs and coding agents against `laguna serve` on the toy, and report what works. Its flags, after the
# first run: .venv/bin/python -m laguna_serve.scripts.clients.run --help
#
#   bash scripts/clients.sh
#   bash scripts/clients.sh --swapped --draft
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
bash scripts/client_env.sh clients
exec .venv/bin/python -m laguna_serve.scripts.clients.run "$@"
