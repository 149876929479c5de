#!/usr/bin/env bash
# Trains under Slurm for as long as it takes: 120 seconds before the time is over every task is asked to save and leave,
# and the job goes back into the queue to go on from there. Adjust the lines of #SBATCH, then `sbatch slurm_requeue.sh`.
#SBATCH --job-name=zoo
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
SUSPENDED=75 # the exit code of a run that has saved and wants to go on

# --signal without B: goes to the tasks of srun, not to this script. --kill-on-bad-exit=0: each task may end in its time.
srun --kill-on-bad-exit=0 python examples/train_clip.py --env-type pytorchDDP --run-folder runs/slurm "$@"
code=$?
if [ "$code" -eq "$SUSPENDED" ]; then
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
