#!/usr/bin/env bash
# Set up, then the project's main job on the toy family: baseline against speculative, one table at the end.
#
#   bash scripts/demo.sh
#   bash scripts/demo.sh --num-prompts 16      # any flag of bench/ab.py, see python bench/ab.py --help
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
exec .venv/bin/python bench/ab.py --model tests/toy/teacher --draft tests/toy/dflash --gamma 7 \
  --prompts tests/toy/prompts.jsonl --num-prompts 64 --max-tokens 128 --out out/demo "$@"
