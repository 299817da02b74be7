#!/usr/bin/env bash
# The rows of README's "Measured": each contender in a process of its own, one after the other, on one card.
#
#   run.sh MODELS RESULTS.jsonl GROUP ...      groups: 8b 1b families memory longest
#
# Rivals have to be importable. PY, LIMIT (seconds for one contender) and FLAG (what SLOTH_PLUGINS is for ours) in the
# environment. A contender that fails is named, and the others go on.
set -uo pipefail
[ $# -ge 3 ] || { sed -n '2,8p' "$0"; exit 2; }
mkdir -p "$1" "$(dirname "$2")"
models=$(realpath "$1") results=$(realpath "$2")
shift 2
cd "$(dirname "$0")/.."
py=${PY:-python3}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false UNSLOTH_DISABLE_STATISTICS=1
began=$SECONDS failed=0

timed() {  # MODULE CONTENDER MODEL [option ...]
  local log flag=""
  log=$(mktemp)
  [ "$2" = sloth ] && flag=${FLAG:-1}
  if SLOTH_PLUGINS=$flag timeout "${LIMIT:-150}" "$py" -m "training.$1" "$2" "$models/$3" --results "$results" "${@:4}" >"$log" 2>&1; then
    tail -n 1 "$log"
    grep -h "memory:" "$log" | cut -c1-300
  else
    failed=1
    echo "FAILED $*"
    grep -v Warn "$log" | tail -n 12
  fi
  echo "  after $((SECONDS - began)) s"
}

step() { timed step "$@"; }

make() { "$py" -m training.models "$models" "$@" 2>&1 | grep -E "^made|Error"; }

for group in "$@"; do
  case $group in
    8b)
      make llama-8b
      step sloth llama-8b-nf4 --checkpointing off
      step unsloth llama-8b-nf4 --checkpointing off
      step sloth llama-8b-nf4 --cap 21.27  # what Unsloth has reserved without checkpointing, for 20.77 at its peak
      step sloth llama-8b --checkpointing off
      step unsloth llama-8b --checkpointing off
      step sloth llama-8b-nf4 --cap 6.8  # its peak by default
      step unsloth llama-8b-nf4 --checkpointing unsloth
      step liger llama-8b-nf4
      step hf llama-8b-nf4
      ;;
    1b)
      make llama-1b
      for size in "2 2048" "1 512"; do
        read -r rows length <<<"$size"
        step sloth llama-1b --checkpointing off --rows "$rows" --length "$length" --steps 24
        step unsloth llama-1b --checkpointing off --rows "$rows" --length "$length" --steps 24
      done
      ;;
    families)
      for name in qwen2.5-7b qwen3-8b phi-4 gemma3-4b gemma2-9b; do
        make "$name:6"
        step sloth "$name-6-nf4" --checkpointing off
        step unsloth "$name-6-nf4" --checkpointing off
        [ -z "${BOTH:-}" ] || step unsloth "$name-6-nf4" --checkpointing unsloth
      done
      ;;
    memory)
      make llama-8b
      step sloth llama-8b-nf4 --cap 6.8
      for way in unsloth unsloth+auto; do step unsloth llama-8b-nf4 --checkpointing $way --cap 6.8; done
      for way in on offload selective; do step trl llama-8b-nf4 --checkpointing $way; done
      FLAG=1,-*:checkpointing,-trainer:memory_plans step sloth llama-8b-nf4 --checkpointing off
      step sloth llama-8b-nf4
      for cap in "" "--cap 9.8"; do
        # shellcheck disable=SC2086  # an option and its value
        step sloth llama-8b-nf4 --rows 1 --length 16384 --steps 8 $cap
      done
      step unsloth llama-8b-nf4 --checkpointing unsloth --rows 1 --length 16384 --steps 8
      "$py" -m training.shares "$models/llama-8b-nf4" --results "$results"
      step sloth llama-8b-nf4 --rows 1 --lengths 64 8192 --steps 40 --cap 24
      step unsloth llama-8b-nf4 --checkpointing unsloth --rows 1 --lengths 64 8192 --steps 40 --cap 24
      ;;
    longest)
      make llama-8b
      for cap in 16 24; do
        for contender in sloth unsloth; do timed longest $contender llama-8b-nf4 --cap $cap; done
      done
      ;;
    *) echo "no group $group; see the first lines of $0" >&2; exit 2 ;;
  esac
done
exit $failed
