#!/usr/bin/env bash
# Build the documents as a site; a warning is an error.
#
#   bash scripts/docs.sh            # out/site
#   bash scripts/docs.sh --serve    # on http://127.0.0.1:8000, rebuilt when a page changes
set -euo pipefail
case ${1:-} in
  '' | --serve) ;;
  -h | --help) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "docs: arguments: expected --serve or none, got '$*'; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/client_env.sh docs
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = --serve ]; then exec .venv-docs/bin/mkdocs serve --strict; fi
.venv-docs/bin/mkdocs build --strict --quiet
echo "docs: $(find out/site -name '*.html' | wc -l) pages in out/site" >&2
