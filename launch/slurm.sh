#!/bin/bash
# A run that survives preemption and time limits: it is told two minutes before, saves, is queued again and goes on.
#   sbatch launch/slurm.sh recipes/cpt.py --config recipes/configs/llama-3.1-8b.yaml --output_dir checkpoints/llama
# The same command starts the run and continues it: --resume auto takes the newest checkpoint in output_dir, if any.
# Another launch file or other machines may go on with it: LAUNCH=launch/zero3.yaml sbatch --nodes 4 launch/slurm.sh …
#SBATCH --job-name=gatekv
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -u

launch=${LAUNCH:-launch/multinode.yaml}
gpus=${GPUS:-8} # on each machine
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((20000 + SLURM_JOB_ID % 20000))

again() {
  kill -TERM "$step" 2> /dev/null # srun passes it on to every process, and each saves behind its current step
  wait "$step"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}
trap again TERM

# $SLURM_NODEID is each machine's own, so the inner shell reads it.
srun --kill-on-bad-exit=1 bash -c 'exec accelerate launch --machine_rank "$SLURM_NODEID" "$@"' launch \
  --config_file "$launch" --num_machines "$SLURM_NNODES" --num_processes $((SLURM_NNODES * gpus)) \
  --main_process_ip "$first" --main_process_port "$port" "$@" --resume auto &
step=$!
wait "$step"
