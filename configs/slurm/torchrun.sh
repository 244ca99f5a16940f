#!/usr/bin/env bash
# NNODES=2 HEAD=host:29500 RUN_ID=first bash configs/slurm/torchrun.sh --config configs/cifar10.yaml --data.data_dir DIR
#
# For machines without a scheduler: run the same line on each of NNODES machines, which share this folder. HEAD is the
# name or address of one of them with a free port. The run's folder is runs/<config>/job_<RUN_ID>; the same line again
# resumes there, and so do the processes that torchrun restarts after a failure. Another config under the same RUN_ID is
# a new run, job_<RUN_ID>-2. One process per GPU that torch sees, one on a machine without; or NPROC_PER_NODE.
set -euo pipefail
RUN_ID=${RUN_ID:?must be set to a name for the run}
HEAD=${HEAD:-localhost:29500}
python="$(dirname "$(command -v torchrun)")/python"
[[ -x $python ]] || python=python3

processes=${NPROC_PER_NODE:-}
if [[ -z $processes ]]; then
  gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
  processes=$((gpus > 0 ? gpus : 1))
  echo "torchrun.sh: $gpus GPUs here, so $processes process(es); NPROC_PER_NODE sets another number" >&2
fi

# torchrun takes this machine for HEAD if its own name resolves to that address, which it does not where /etc/hosts maps
# it to 127.0.1.1, as on Debian. An address that a socket can be bound to is this machine's.
head=()
if "$python" - "$HEAD" <<'PYTHON'
import socket, sys

host, _, port = sys.argv[1].rpartition(":")
try:
    found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
    own = {each[4][0] for each in socket.getaddrinfo(socket.gethostname(), None)}
    with socket.socket(found[0], socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(found[4])
except OSError:
    sys.exit(1)  # another machine's, or in use: an agent of this machine listens there already
sys.exit(host in ("localhost", socket.gethostname()) or found[4][0] in own or found[4][0].startswith("127."))
PYTHON
then
  head=(--rdzv-conf is_host=true)
  echo "torchrun.sh: this machine is the head, $HEAD" >&2
fi

# The others reach this machine's processes at the address by which it reaches HEAD, not at its name, which need not
# resolve there. Gloo, by which processes without a GPU communicate, takes the name's unless it is given the interface.
address=$("$python" - "$HEAD" <<'PYTHON'
import socket, sys

host, _, port = sys.argv[1].rpartition(":")
found = socket.getaddrinfo(host, int(port), type=socket.SOCK_DGRAM)[0]
with socket.socket(found[0], socket.SOCK_DGRAM) as probe:
    probe.connect(found[4])  # sends nothing
    print(probe.getsockname()[0])
PYTHON
)

# Else processes that torchrun restarts find the addresses of those before them in its store, and cannot connect.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1

torchrun --local-addr "$address" --nnodes "${NNODES:-1}" --nproc-per-node "$processes" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "$RUN_ID" ${head[@]+"${head[@]}"} \
  --no-python simo fit "$@" --ckpt_path last --trainer.strategy ddp \
  --trainer.devices "$processes" --trainer.num_nodes "${NNODES:-1}"
