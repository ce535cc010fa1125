#!/usr/bin/env bash
# Train a recipe under DeepSpeed: on this machine's GPUs, or on the hosts of a hostfile, which it reaches by ssh.
#
#   launch/train.sh VQ_SS256 --out runs/ss --zero 2 data.train=shards/train data.validation=shards/val
#   HOSTFILE=hostfile launch/train.sh VQ_XLXXL256 --out /shared/runs/xl --tp 4 --zero 3 data.train=/shared/train ...
#   HOSTFILE=hostfile launch/train.sh --dry-run GPT-B --out ...     prints what would be run, and starts nothing
#   HOSTFILE=hostfile launch/train.sh --max-restarts 5 --min-hosts 7 VQ_XLXXL256 --out ...
#
# --max-restarts N: start again after a fault, at most N times in a row without a new checkpoint; errors of the command
# line, an interruption and a run that was asked to stop are final. Before each restart the hosts that the hostfile names
# by then are asked whether they can take part, as by check-cluster; those that cannot are left out if at least
# --min-hosts N (default: all) can, and otherwise that was a try.
#
# The arguments are those of `gigatok-ds train` (see its --help). For several hosts, first ask
#   gigatok-ds check-cluster --hostfile hostfile --out /shared/runs/xl --recipe VQ_XLXXL256
#
# Environment:
#   HOSTFILE     hosts and their ranks, as in launch/hostfile.example (default: this machine alone)
#   GPUS         ranks on each host (default: its slots in the hostfile; without one, all GPUs)
#   MASTER_ADDR  where the ranks meet (default: the first host of the hostfile); every host must reach that address
#   MASTER_PORT  and the TCP port there (default: 29500)
#   FORCE_SSH=1  reach the host by ssh also when the hostfile has a single one, which DeepSpeed takes for this machine
#
# Several hosts need: pdsh here; ssh from here to each without a password; this checkout, the python that is first on
# PATH here and the working directory under the same paths everywhere; and --out on a file system that all hosts share.
#
# What ranks on other hosts know of this shell: DeepSpeed carries variables whose names begin with PYTHON, MLFLOW, MV2,
# UCX and, from a machine with GPUs, NCCL. It reads NAME=value lines from .deepspeed_env in your home and in the working
# directory (the latter wins; DS_ENV_FILE names another file; see launch/deepspeed_env.example). PATH stays behind. This
# script hands DeepSpeed those lines together with what training listens to and this shell has set: PYTHONPATH, OMP_*,
# MKL_*, GLOO_*, NCCL_*, TORCH_*, PYTORCH_*, UCX_*, FI_*, DS_ACCELERATOR, CUDA_DEVICE_MAX_CONNECTIONS, HF_HOME,
# HF_HUB_CACHE, HF_HUB_OFFLINE, TRITON_CACHE_DIR, XDG_CACHE_HOME, LD_LIBRARY_PATH, GIGATOK_TRACEBACK. Your file wins.
#
# Interrupting a job of several hosts makes DeepSpeed end every `deepspeed.launcher.launch` of this python that you run
# on those hosts, also those of another job.

set -euo pipefail

case "${1:-}" in
"" | -h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"

if ! python="$(type -P python || type -P python3)" ||
    ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "train.sh: error: ${python:-python} is not Python 3.11; activate the environment that has DeepSpeed" >&2
    exit 2
fi
exec "$python" -m gigatok_ds.cli.launcher "$@"
