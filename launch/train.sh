#!/usr/bin/env bash
# Train a recipe on the hosts of a hostfile, or on this machine's GPUs when HOSTFILE is not set.
#
#   launch/train.sh VQ_SS256 --out runs/ss --zero 3 data.train=/data/train data.validation=/data/val
#   HOSTFILE=launch/hostfile.example launch/train.sh GPT-B --out runs/gpt-b data.train=codes/train ...
#
# Environment: HOSTFILE (see hostfile.example), GPUS (ranks per host; default: all), MASTER_PORT (default 29500).
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

arguments=(--no_local_rank --master_port "${MASTER_PORT:-29500}")
[[ -n "${HOSTFILE:-}" ]] && arguments+=(--hostfile "$HOSTFILE")
[[ -n "${GPUS:-}" ]] && arguments+=(--num_gpus "$GPUS")

exec deepspeed "${arguments[@]}" --module gigatok_ds train "$@"
