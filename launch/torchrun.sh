#!/usr/bin/env bash
# Train a recipe without ssh: run this on every host, with the same arguments; the ranks meet at MASTER_ADDR.
#
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=worker-1 launch/torchrun.sh GPT-B --out /shared/runs/gpt-b --zero 1 data.train=...
#   NNODES=2 NODE_RANK=1 MASTER_ADDR=worker-1 launch/torchrun.sh GPT-B --out /shared/runs/gpt-b --zero 1 data.train=...
#   launch/torchrun.sh --dry-run ...                prints what would be run on this host, and starts nothing
#
# The arguments are those of `gigatok-ds train` (see its --help).
#
# Environment:
#   NNODES       number of hosts (default: 1)
#   NODE_RANK    which of them this is, from 0 (default: SLURM_NODEID, which srun sets; else 0)
#   MASTER_ADDR  name of host 0 as all of them reach it (needed for several hosts)
#   MASTER_PORT  and a free TCP port there (default: 29500)
#   GPUS         ranks on this host (default: all its GPUs; without a GPU, one)
#
# Where a scheduler starts every rank itself and sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, this
# process becomes that rank, and none of the above is needed.

set -euo pipefail

refuse() {
    echo "torchrun.sh: error: $1" >&2
    exit 2
}

dry_run=
case "${1:-}" in
"" | -h | --help)
    sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
    ;;
--dry-run)
    dry_run=1
    shift
    ;;
esac

here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
if ! python="$(type -P python || type -P python3)" ||
    ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    refuse "${python:-python} is not Python 3.11; activate the environment that has DeepSpeed"
fi

export MASTER_PORT="${MASTER_PORT:-29500}"
if [[ -n "${RANK:-}" && -n "${LOCAL_RANK:-}" && -n "${WORLD_SIZE:-}" ]]; then
    [[ -n "${MASTER_ADDR:-}" ]] || refuse "RANK is set but MASTER_ADDR is not; give the name of the host of rank 0"
    command=("$python" -u -m gigatok_ds train "$@")
elif [[ -n "${RANK:-}${LOCAL_RANK:-}" ]]; then
    refuse "RANK, LOCAL_RANK and WORLD_SIZE must all be set, or, to start a whole host, neither RANK nor LOCAL_RANK"
else
    nodes="${NNODES:-1}"
    [[ "$nodes" == 1 || -n "${MASTER_ADDR:-}" ]] || refuse "NNODES is $nodes; set MASTER_ADDR to the name of host 0"
    ranks="${GPUS:-}"
    if [[ -z "$ranks" ]]; then
        nvidia-smi --list-gpus >/dev/null 2>&1 && ranks=gpu || ranks=1
    fi
    command=("$python" -m torch.distributed.run --nnodes "$nodes" --node_rank "${NODE_RANK:-${SLURM_NODEID:-0}}"
        --nproc_per_node "$ranks" --master_addr "${MASTER_ADDR:-127.0.0.1}" --master_port "$MASTER_PORT"
        -m gigatok_ds train "$@")
fi

if [[ -n "$dry_run" ]]; then
    for name in PYTHONPATH MASTER_ADDR MASTER_PORT RANK LOCAL_RANK WORLD_SIZE OMP_NUM_THREADS; do
        [[ -z "${!name:-}" ]] || printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
exec "${command[@]}"
