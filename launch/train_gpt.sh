#!/usr/bin/env bash
# Train a published GPT on the codes of a tokenizer.
#
#   CODES=/data/codes-ss launch/train_gpt.sh
#   HOSTFILE=hostfile RECIPE=GPT-XXL TP=2 CODES=... OUT=/shared/runs/gpt-xxl launch/train_gpt.sh
#   launch/train_gpt.sh --dry-run                   prints what would be run, and starts nothing
#
# Settings of the recipe (key=value) may follow: launch/train_gpt.sh training.steps=1000
#
# Environment, besides that of launch/train.sh (HOSTFILE, GPUS, ...):
#   RECIPE   which GPT (default: GPT-B; see gigatok-ds recipes)
#   CODES    directory of code shards in train/ and val/, by gigatok-ds extract-codes (default: codes)
#   OUT      run directory; the same one resumes (default: runs/ and the recipe)
#   TP       tensor-parallel ranks for each model, within a host (default: 1)
#   ZERO     ZeRO stage, 0 to 3 (default: 1)

set -euo pipefail

dry_run=()
case "${1:-}" in
-h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
--dry-run)
    dry_run=(--dry-run)
    shift
    ;;
esac

recipe="${RECIPE:-GPT-B}"
codes="${CODES:-codes}"
arguments=("$recipe" --out "${OUT:-runs/$recipe}" --zero "${ZERO:-1}"
    "data.train=$codes/train" "data.validation=$codes/val")
[[ "${TP:-1}" == 1 ]] || arguments+=(--tp "$TP")

exec "$(dirname "${BASH_SOURCE[0]}")/train.sh" "${dry_run[@]}" "${arguments[@]}" "$@"
