#!/bin/bash
# A recipe on several machines of a Slurm cluster, one process per GPU.
#
#     sbatch --nodes=4 --gpus-per-node=8 recipes/slurm.sh recipes/mdlm_sft.py \
#         --config recipes/configs/tiny_a2d_qwen3_0.6b_mdlm_sft.yaml
#
# ACCELERATE_CONFIG names another file of recipes/accelerate_configs than multi_gpu.yaml. A job that is requeued goes on
# from its last checkpoint by itself.
#SBATCH --job-name=a2d
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --output=runs/slurm-%j.log
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

if [ $# -lt 1 ]; then
    echo "slurm.sh: name a recipe, for example recipes/mdlm_sft.py, and its arguments." >&2
    exit 2
fi
if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ]; then
    set -- "$@" --resume_from_checkpoint true
fi
config=${ACCELERATE_CONFIG:-recipes/accelerate_configs/multi_gpu.yaml}
gpus=${SLURM_GPUS_ON_NODE:?slurm.sh: start it with sbatch, and ask for GPUs with --gpus-per-node.}
main=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0}

# Each node starts accelerate, which starts one process per GPU.
srun bash -c '
    accelerate launch --config_file "$0" \
        --num_machines "$SLURM_NNODES" --num_processes "$(("$SLURM_NNODES" * '"$gpus"'))" \
        --machine_rank "$SLURM_NODEID" --main_process_ip '"$main"' --main_process_port 29500 "$@"
' "$config" "$@"
