#!/bin/bash
# An importance matrix by a Slurm array, and its merge. Submit with: sbatch examples/slurm.sh MODEL TEXT OUT.gguf
#SBATCH --job-name=imatrix
#SBATCH --array=0-7
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=04:00:00
set -euo pipefail
model=$1 text=$2 out=$3

# The first task submits the merge, which runs once all tasks of the array have succeeded.
if [ "$SLURM_ARRAY_TASK_ID" = "$SLURM_ARRAY_TASK_MIN" ]; then
    sbatch --dependency="afterok:$SLURM_ARRAY_JOB_ID" --wrap "gemma2tool merge '$out'"
fi
# The shard is that of the array's task.
gemma2tool imatrix "$model" "$out" --text "$text" --threads "$SLURM_CPUS_PER_TASK" --force
