#!/usr/bin/env bash
# One machine's part of a run on several: start it on every machine of the hostfile, NODE being its place there.
# Command:   NODE=0 configs/launch/node.sh configs/pretrain/cm3leon_350m.yaml
#
# Settings, from the environment:
#   NODE       0 on the first machine of the hostfile, 1 on the second, ...
#   HOSTFILE   default: configs/launch/hostfile
#   PORT       of the first machine, free there; default: 29500
#   PYTHON     default: python
# Data and run folder lie on a disk that all machines see. After a SIGTERM torchrun waits 30 seconds for the checkpoint
# and then kills: for models that take longer see slurm.sh, or stop them right after a checkpoint.
set -euo pipefail

hostfile=${HOSTFILE:-$(dirname "$0")/hostfile}
mapfile -t machines < <(grep -E '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile")
node=${NODE:?"set NODE to the place of this machine in $hostfile: 0 is the first"}
if [[ ! $node =~ ^[0-9]+$ || $node -ge ${#machines[@]} ]]; then
    echo "error: NODE=$node, but $hostfile has ${#machines[@]} machines; count from 0" >&2
    exit 2
fi
if [[ $# -eq 0 ]]; then
    echo "error: which run? give a config, such as configs/pretrain/cm3leon_350m.yaml" >&2
    exit 2
fi
slots=${machines[$node]##*slots=}

exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes "${#machines[@]}" \
    --node-rank "$node" \
    --nproc-per-node "${slots%%[^0-9]*}" \
    --master-addr "${machines[0]%%[[:space:]]*}" \
    --master-port "${PORT:-29500}" \
    -m cm3 train "$@"
