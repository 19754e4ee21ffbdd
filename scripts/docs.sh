#!/usr/bin/env bash
# Build the documents as a site; a warning is an error.
#
#   bash scripts/docs.sh            # out/site
#   bash scripts/docs.sh --serve    # on http://127.0.0.1:8000, rebuilt when a page changes
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/client_env.sh docs
export NO_MKDOCS_2_WARNING=1
if [ "${1:-}" = --serve ]; then exec .venv-docs/bin/mkdocs serve --strict; fi
.venv-docs/bin/mkdocs build --strict --quiet
echo "docs: $(find out/site -name '*.html' | wc -l) pages in out/site" >&2
