#!/usr/bin/env bash
# Check the files of serving/deploy as their own tools do: container files, the compose file, Kubernetes manifests, the
# systemd unit where systemd is, and the gateway's configurations. What they say of this project is in
# tests/serving/test_deployment.py.
set -euo pipefail
case ${1:-} in
  '') ;;
  -h | --help) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
  *) echo "deployment: arguments: expected none, got '$*'; see --help" >&2; exit 2 ;;
esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/bootstrap.sh
bash scripts/client_env.sh deploy
deploy=serving/deploy tools=.venv-deploy/bin
"$tools/hadolint" --failure-threshold info "$deploy"/Containerfile.*
"$tools/check-jsonschema" --quiet --builtin-schema vendor.compose-spec "$deploy/compose.yaml"
"$tools/kubernetes-validate" --strict --quiet "$deploy"/kubernetes/{engines,gateway}.yaml
for configuration in "$deploy/gateway.toml" "$deploy/kubernetes/gateway.toml"; do
  .venv/bin/laguna gateway --config "$configuration" --check >/dev/null
done
if command -v systemd-analyze >/dev/null; then
  # The unit as it is, with programs that are here in the place of those that an installation has.
  unit=$(mktemp -d)
  trap 'rm -rf "$unit"' EXIT
  sed "s#/opt/laguna/bin/laguna#$PWD/.venv/bin/laguna#" "$deploy/laguna-gateway.service" >"$unit/laguna-gateway.service"
  systemd-analyze verify "$unit/laguna-gateway.service"
fi
echo "deployment: container files, compose file, manifests, unit and configurations are valid" >&2
