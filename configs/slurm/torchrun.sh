#!/usr/bin/env bash
# NNODES=2 HEAD=host:29500 RUN_ID=first bash configs/slurm/torchrun.sh --config configs/cifar10.yaml --data.data_dir DIR
#
# For machines without a scheduler: run the same line on each of NNODES machines, which share this folder. HEAD is any
# one of them with a free port. The run's folder is runs/<config>/job_<RUN_ID>; the same line again goes on there, and
# so do the processes that torchrun restarts after a failure.
set -euo pipefail
processes=${NPROC_PER_NODE:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}
if ((processes == 0)); then processes=1; fi
torchrun --nnodes "${NNODES:-1}" --nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "${HEAD:-localhost:29500}" --rdzv-id "${RUN_ID:?a name for the run}" \
  --no-python simo fit "$@" --ckpt_path last --trainer.strategy ddp \
  --trainer.devices "$processes" --trainer.num_nodes "${NNODES:-1}"
