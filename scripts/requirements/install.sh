#!/usr/bin/env bash
# Install a locked list into an environment: by uv, in a fraction of pip's time, or by pip where uv cannot.
#
#   bash scripts/requirements/install.sh ENVIRONMENT/bin/python LIST.lock
#
# uv itself comes by pip, and looks where pip is configured to look. What it says is on stdout and stderr.
set -euo pipefail
python=$1 lock=$2
pip=("$python" -m pip --disable-pip-version-check)
pip_install=("${pip[@]}" install --quiet --no-deps --no-compile)

find_uv() {
  local own
  for own in .venv/bin/uv "$(dirname "$python")/uv"; do
    if [ -x "$own" ]; then echo "$own"; return; fi
  done
  "${pip_install[@]}" -r "$(dirname "${BASH_SOURCE[0]}")/uv.lock" >&2 && [ -x "$own" ] && echo "$own"
}

install_by_uv() {
  local uv line value url places=() index=''
  uv=$(find_uv) || return 1
  # Lines such as global.find-links='/one /other', those of the environment first.
  while IFS= read -r line; do
    value=${line#*=\'} value=${value%\'}
    case ${line%%=*} in
      *.index-url) index=${index:-$value} ;;
      *.extra-index-url) for url in $value; do places+=(--index "$url"); done ;;
      *.find-links) for url in $value; do places+=(--find-links "$url"); done ;;
      *.no-index) places+=(--no-index) ;;
      *.cert) export SSL_CERT_FILE=${SSL_CERT_FILE:-$value} ;;
    esac
  done < <("${pip[@]}" config list)
  if [ -n "$index" ]; then places+=(--default-index "$index"); fi
  "$uv" pip install --quiet --no-deps --index-strategy unsafe-best-match --python "$python" \
    ${places[@]+"${places[@]}"} -r "$lock"
}

install_by_uv || "${pip_install[@]}" -r "$lock"
