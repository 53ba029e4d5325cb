#!/usr/bin/env bash
# A run on a Slurm cluster: one process a GPU, started by srun itself.
# Command:   sbatch configs/launch/slurm.sh configs/pretrain/cm3leon_7b.yaml
#
# Submit it as often as the run needs, from the root of the repository: jobs of one name run one after the other, and
# each goes on from the last checkpoint. Ten minutes before its time is up a job gets SIGTERM, saves and ends well.
# Give what your cluster wants (partition, account, other sizes) on the command line, before the script. Data and run
# folder lie on a disk that all machines see. PYTHON chooses the interpreter; default: python.
#SBATCH --job-name=cm3
#SBATCH --nodes=64
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --dependency=singleton
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
set -euo pipefail

if [[ $# -eq 0 ]]; then
    echo "error: which run? give a config, such as configs/pretrain/cm3leon_7b.yaml" >&2
    exit 2
fi
mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${machines[0]}
export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000)) # two jobs on one machine have two ports
export PYTHON=${PYTHON:-python}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

# shellcheck disable=SC2016 # the variables are those of each process
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" bash -c \
    'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS exec "$PYTHON" -m cm3 train "$@"' \
    cm3 "$@"
