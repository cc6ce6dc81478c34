#!/usr/bin/env bash
# Starts the trainer (launch/trainer/train.py) on one node or on several; see usage below.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

usage() {
    cat <<'TEXT'
Usage: launch/torchrun.sh [OPTION...] [--] [OPTION OF THE TRAINER...]

Run the same command on every node. Each option has an environment variable; the option wins.

  --nproc N          NPROC          ranks on this node (default: one per GPU, 1 without GPUs)
  --nnodes N         NNODES         nodes (default: 1)
  --node-rank R      NODE_RANK      this node's number; node 0 hosts the rendezvous (default: 0)
  --endpoint H:PORT  RDZV_ENDPOINT  address of node 0 and a free port on it (needed for several nodes)
  --id NAME          RDZV_ID        name of the run, the same on every node (default: dist_asgd)
  --iface NAME       IFACE          network interface that ranks talk over (default: the backend's choice)
  --local-addr A     LOCAL_ADDR     address of this node for the others (default: that of --iface)
  --train-help                      options of the trainer
  --help                            this text

Python: .venv of this repository where it exists, else `python` on the PATH; PYTHON overrides both.
Ctrl-C and SIGTERM go to the ranks, which finish their step, write a checkpoint and end with status 0.
TEXT
}

python="${PYTHON:-}"
if [ -z "$python" ]; then
    python=python
    [ ! -x "$VENV/bin/python" ] || python="$VENV/bin/python"
fi

# Prints the trainer's options. If the reader of a pipe (`| head`) has enough, that is no error.
train_help() {
    local text
    if [ -t 1 ]; then
        "$python" "$REPOSITORY/launch/trainer/train.py" --help # as wide as the terminal
    else
        text="$("$python" "$REPOSITORY/launch/trainer/train.py" --help)"
        trap '' PIPE
        printf '%s\n' "$text" 2>/dev/null || true
    fi
}

nproc="${NPROC:-}"
nnodes="${NNODES:-1}"
node_rank="${NODE_RANK:-0}"
endpoint="${RDZV_ENDPOINT:-}"
run_id="${RDZV_ID:-dist_asgd}"
iface="${IFACE:-}"
local_addr="${LOCAL_ADDR:-}"
while [ $# -gt 0 ]; do
    case "$1" in
        --nproc | --nnodes | --node-rank | --endpoint | --id | --iface | --local-addr)
            [ $# -ge 2 ] || { echo "$1 needs a value; see --help" >&2; exit 2; } ;;
    esac
    case "$1" in
        --nproc) nproc="$2"; shift 2 ;;
        --nnodes) nnodes="$2"; shift 2 ;;
        --node-rank) node_rank="$2"; shift 2 ;;
        --endpoint) endpoint="$2"; shift 2 ;;
        --id) run_id="$2"; shift 2 ;;
        --iface) iface="$2"; shift 2 ;;
        --local-addr) local_addr="$2"; shift 2 ;;
        --help) usage; exit 0 ;;
        --train-help) train_help; exit 0 ;;
        --) shift; break ;;
        *) break ;;
    esac
done

if [ -z "$nproc" ]; then
    nproc=1
    ! nvidia-smi -L >/dev/null 2>&1 || nproc=gpu
fi

launcher=("$python" "$REPOSITORY/launch/launcher.py" --nproc-per-node "$nproc")
if [ "$nnodes" = 1 ]; then
    launcher+=(--standalone)
else
    [ -n "$endpoint" ] || { echo "several nodes need --endpoint HOST:PORT of node 0; see --help" >&2; exit 2; }
    is_host=$([ "$node_rank" = 0 ] && echo 1 || echo 0)
    # Without is_host and local-addr, torchrun guesses both from host names, which fails on many networks.
    launcher+=(--nnodes "$nnodes" --rdzv-backend c10d --rdzv-endpoint "$endpoint" --rdzv-id "$run_id"
        --rdzv-conf "is_host=$is_host")
    if [ -z "$local_addr" ] && [ -n "$iface" ]; then
        local_addr="$(ip -4 -o address show dev "$iface" | awk '{sub("/.*", "", $4); print $4; exit}')"
    fi
    [ -z "$local_addr" ] || launcher+=(--local-addr "$local_addr")
fi
if [ -n "$iface" ]; then
    export GLOO_SOCKET_IFNAME="$iface" NCCL_SOCKET_IFNAME="$iface"
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# torchrun itself would pass a signal on but end with an error and kill the ranks 30 seconds later. With job
# control it has a process group of its own, so that Ctrl-C reaches only this script, which tells the ranks.
set -m
"${launcher[@]}" "$REPOSITORY/launch/trainer/train.py" "$@" &
torchrun=$!
# Where pkill is missing or no rank runs yet, torchrun's own way of ending has to do.
trap 'pkill -TERM -P "$torchrun" || kill -TERM "$torchrun" || true' INT TERM HUP
status=0
while true; do
    wait "$torchrun" && status=0 || status=$?
    kill -0 "$torchrun" 2>/dev/null || break # else a signal ended the wait, not torchrun
done
exit "$status"
