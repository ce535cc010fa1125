#!/usr/bin/env bash
# Train a published tokenizer.
#
#   SHARDS=/data/imagenet-shards launch/train_tokenizer.sh
#   HOSTFILE=hostfile RECIPE=VQ_XLXXL256 TP=4 ZERO=3 SHARDS=... OUT=/shared/runs/xl launch/train_tokenizer.sh
#   launch/train_tokenizer.sh --dry-run             prints what would be run, and starts nothing
#
# Settings of the recipe (key=value) may follow: launch/train_tokenizer.sh training.steps=1000
#
# Environment, besides that of launch/train.sh (HOSTFILE, GPUS, ...):
#   RECIPE   which tokenizer (default: VQ_SS256; see gigatok-ds recipes)
#   SHARDS   directory of image shards in train/ and val/, by gigatok-ds make-shards (default: shards)
#   WEIGHTS  directory of the frozen networks' files, vgg16-397923af.pth and dinov2_vitb14_pretrain.pth
#            (default: weights)
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

recipe="${RECIPE:-VQ_SS256}"
shards="${SHARDS:-shards}"
weights="${WEIGHTS:-weights}"
arguments=("$recipe" --out "${OUT:-runs/$recipe}" --zero "${ZERO:-1}"
    "data.train=$shards/train" "data.validation=$shards/val"
    "loss.perceptual.weights=$weights/vgg16-397923af.pth"
    "loss.semantic.weights=$weights/dinov2_vitb14_pretrain.pth")
[[ "${TP:-1}" == 1 ]] || arguments+=(--tp "$TP")

exec "$(dirname "${BASH_SOURCE[0]}")/train.sh" "${dry_run[@]}" "${arguments[@]}" "$@"
