#!/usr/bin/env bash
# The toy teacher in FP8, whole and pruned by 10, 25 and 40%: bytes, loss, speed, DFlash's speed-up and parity.
#   bash scripts/fp8_toy.sh OUT [PERCENT …]      results below OUT; what is there already is not measured again
#   PART=loss, speed or exact: one part alone; PROMPTS=N: of speed and exact (64); PORT=N: the server that loss asks
# Loss is that of the served model on the toy's held-out prompts; each speed-up is the model's own plain decoding against
# its DFlash, interleaved in one run; "exact" compares with the dequantised original, zeroed, in bf16.
set -euo pipefail
case " $* " in *' -h '* | *' --help '*) sed -n '2,/^[^#]/{/^#/!q;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;; esac
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ $# -lt 1 ]; then
  sed -n '2,6s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
  exit 2
fi
out=$1
shift
percents=("$@")
[ ${#percents[@]} -gt 0 ] || percents=(0 10 25 40)
laguna=(.venv/bin/python -m laguna_serve.serving.cli)
masks=tests/toy/masks
prompts=tests/toy/prompts.jsonl
port=${PORT:-18377}

choose_mask() { # PERCENT: the flags of `laguna compact`
  if [ "$1" = 0 ]; then
    echo --random-mask 0 --group-indices $masks/group_indices_importance_sorted.npy
  else
    echo --keep-mask "$masks/group_keep_mask_$1pct.npy" --group-indices $masks/group_indices_importance_sorted.npy
  fi
}

measure_loss() { # MODEL OUT, then vLLM's flags
  [ -f "$2/loss.json" ] && return
  "${laguna[@]}" serve "$1" --port "$port" --log "$2.log" -- "${@:3}" > "$2.serve" 2>&1 &
  local server=$!
  for _ in $(seq 300); do
    curl -sf "http://127.0.0.1:$port/v1/models" > /dev/null && break
    kill -0 $server 2> /dev/null || break
    sleep 1
  done
  local status=0
  .venv/bin/python evals/loss.py --base-url "http://127.0.0.1:$port" --text $prompts --out "$2" || status=$?
  kill -INT $server 2> /dev/null || true
  wait $server || true
  return $status
}

compare() { # OUT, then ab.py's flags; 1 where answers differ by more than rounding, which ends nothing: the table has it
  [ -f "$1/ab.json" ] && return
  .venv/bin/python bench/ab.py --prompts $prompts --num-prompts "${PROMPTS:-64}" --out "$@" || [ $? = 1 ]
}

mkdir -p "$out/models"
"${laguna[@]}" quantise tests/toy/teacher --to fp8 --out "$out/models/fp8"
"${laguna[@]}" quantise "$out/models/fp8" --to bf16 --out "$out/models/bf16"
if [ "${PART:-loss}" = loss ]; then # the bf16 teacher, with the KV cache in bf16 and in FP8
  measure_loss tests/toy/teacher "$out/loss-bf16"
  measure_loss tests/toy/teacher "$out/loss-bf16-kv" --kv-cache-dtype fp8
fi
for percent in "${percents[@]}"; do
  model=$out/models/fp8-$percent original=$out/models/zeroed-$percent
  read -ra mask < <(choose_mask "$percent")
  "${laguna[@]}" compact "$out/models/fp8" "${mask[@]}" --out "$model" --verify | tee "$out/compact-$percent.txt"
  "${laguna[@]}" compact "$out/models/bf16" "${mask[@]}" --zeroed --out "$original"
  [ "${PART:-loss}" != loss ] || measure_loss "$model" "$out/loss-$percent"
  [ "${PART:-speed}" != speed ] ||
    compare "$out/dflash-$percent" --model "$model" --draft tests/toy/dflash --gamma 7
  # Both with a KV cache in bf16: what differs is the rounding of the FP8 model's weights to bf16.
  [ "${PART:-exact}" != exact ] ||
    compare "$out/exact-$percent" --model "$original" --candidate-model "$model" \
      --candidate-args='--kv-cache-dtype bfloat16'
done
.venv/bin/python - "$out" "${percents[@]}" << 'END'
import json, pathlib, sys

out, percents = pathlib.Path(sys.argv[1]), sys.argv[2:]


def read(*parts):
    path = out.joinpath(*parts)
    return json.loads(path.read_text().splitlines()[-1] if path.suffix == ".txt" else path.read_text()) if path.exists() else {}


print("| pruned | on disk, MiB | held, MiB | loss, nats | DFlash against plain | prompts that differ | from the dequantised, in bf16 |")
print("|--|--|--|--|--|--|--|")
for percent in percents:
    sizes, loss = read(f"compact-{percent}.txt"), read(f"loss-{percent}", "loss.json")
    speed, exact = read(f"dflash-{percent}", "ab.json"), read(f"exact-{percent}", "ab.json")
    cells = [f"{percent}%", *(f"{sizes[key] / 2**20:.2f}" for key in ("bytes_after", "held_bytes"))]
    cells.append(f"{loss['loss']['nats_per_token']:.4f}" if loss else "")
    point, interval = ("", None) if not speed else (f"{speed['speedup']['point']:.2f}×", speed["speedup"]["ci95"])
    cells.append(point if not interval else f"{point} ({interval[0]:.2f}–{interval[1]:.2f})")  # of few prompts none
    cells += ["{mismatches} of {prompts}".format(**result["parity"]) if result else "" for result in (speed, exact)]
    print("|", " | ".join(cells), "|")
END
