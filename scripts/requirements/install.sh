#!/usr/bin/env bash
# Install a locked list into an environment: by uv, in a fraction of pip's time, or by pip where uv cannot.
#
#   bash scripts/requirements/install.sh ENVIRONMENT/bin/python LIST.lock
#
# uv itself comes by pip, and looks where pip is configured to look. What it says is on stdout and stderr.
set -euo pipefail
python=$1 lock=$2
pip=("$python" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile)

find_uv() {
  local own
  for own in .venv/bin/uv "$(dirname "$python")/uv"; do
    if [ -x "$own" ]; then echo "$own"; return; fi
  done
  "${pip[@]}" -r "$(dirname "${BASH_SOURCE[0]}")/uv.lock" >&2 && [ -x "$own" ] && echo "$own"
}

# As variables, not arguments: an index's address may hold a password, which others could read among the latter.
read_places() {
  "$python" - <<'PYTHON'
"""Print what pip would install with, of its files and variables, as uv's variables."""
import shlex

from pip._internal.commands import create_command

options, _ = create_command("install").parse_args([])
found = {
    "UV_DEFAULT_INDEX": options.index_url,
    "UV_INDEX": " ".join(options.extra_index_urls),
    "UV_FIND_LINKS": ",".join(options.find_links),
    "UV_NO_INDEX": "1" if options.no_index else "",
    "UV_INSECURE_HOST": " ".join(options.trusted_hosts),
    "SSL_CERT_FILE": options.cert,
    "SSL_CLIENT_CERT": options.client_cert,
    "HTTPS_PROXY": options.proxy,
    "HTTP_PROXY": options.proxy,
}
print("".join(f"export {name}={shlex.quote(value)}\n" for name, value in found.items() if value))
PYTHON
}

install_by_uv() {
  local uv places
  uv=$(find_uv) && places=$(read_places) || return 1
  eval "$places"
  "$uv" pip install --quiet --no-deps ${UV_NO_INDEX:+--no-index} --index-strategy unsafe-best-match \
    --python "$python" -r "$lock"
}

(install_by_uv) || "${pip[@]}" -r "$lock"
