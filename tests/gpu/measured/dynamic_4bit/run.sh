#!/usr/bin/env bash
# The experiment behind README's "Dynamic 4-bit": its tables of selection, fine-tuning, requantising, time and memory.
#
#   run.sh WORK RESULTS.jsonl [PART ...]      parts: corpus train evaluate finetune requantize shape blocks table
#
# Without parts all of them run, in that order; what a part needs of an earlier one lies in WORK. Nothing is downloaded.
# What is timed runs alone; evaluate, finetune and requantize have a process for each model, side by side. Knobs in the
# environment: PY, SEEDS="0 1 2", SECONDS_A_SEED=70, and the options of a part (its --help has them) under its name, as in
# TRAIN="--batch 256" EVALUATE="--rows 512" FINETUNE="--steps 300".
set -euo pipefail
[ $# -ge 2 ] || { sed -n '2,9p' "$0"; exit 2; }
mkdir -p "$1" "$(dirname "$2")"
work=$(realpath "$1") results=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
py=${PY:-python3}
read -ra seeds <<<"${SEEDS:-0 1 2}"
models="${seeds[*]/#/seed}"
truth=${TRUTH:-${models%% *}}  # the model that has the slow truth as well
export TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-true} HF_HUB_OFFLINE=1

part() {  # NAME [option ...]
  local name=$1
  shift
  "$py" -m "dynamic_4bit.$name" --work "$work" --results "$results" "$@"
}

each() {  # "MODEL ..." NAME [option ...]: one process for each model, side by side, as none keeps the device busy
  local pids=() failed=0 model all=$1 more
  shift
  for model in $all; do
    more=()
    [ "$1 $model" != "evaluate $truth" ] || more=(--truth --loaded)
    OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} part "$@" "${more[@]}" --model "$model" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
  return $failed
}

[ $# -gt 0 ] || set -- corpus train evaluate finetune requantize shape blocks table
# shellcheck disable=SC2086  # options are words
run() {  # NAME
  case $1 in
    corpus) part corpus ${CORPUS:-} ;;
    train) part train --seeds "${seeds[@]}" --seconds "${SECONDS_A_SEED:-70}" ${TRAIN:-} ;;
    evaluate) each "$models outliers" evaluate ${EVALUATE:-} ;;
    finetune) each "$models" finetune ${FINETUNE:-} ;;
    requantize) each "$models" requantize ${REQUANTIZE:-} ;;
    shape) part shape --write ${SHAPE:-} ;;
    blocks) part blocks ${BLOCKS:-} ;;
    table) "$py" -m dynamic_4bit.table "$results" ;;
    *) echo "no part $1; see the first lines of $0" >&2; return 2 ;;
  esac
}

code=0
for name in "$@"; do
  began=$(date +%s) how=done
  # Parts after it may need nothing of one that has failed.
  run "$name" || { how=FAILED code=1; }
  echo "part $name: $how after $(($(date +%s) - began)) s"
done
exit $code
