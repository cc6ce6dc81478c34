#!/usr/bin/env bash
# Trains a small language model on 2 ranks of this machine and shows what averaging gains. Needs Python >= 3.11
# and git only; can be run again. Arguments go to the trainer.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_venv "$REPOSITORY/launch/requirements.txt"
cd "$REPOSITORY"
# The learning rate is the one of 1, 2 and 4 that brings the last iterate itself furthest in this many steps. Its
# noise is what the average over the last quarter takes away: 1.67 nats per byte held out against 1.59.
case " $* " in
    *" --resume"*) ;;
    *) set -- --overwrite "$@" ;;
esac
NPROC=2 OMP_NUM_THREADS=1 exec launch/torchrun.sh -- --out runs/demo \
    --d-model 64 --layers 3 --heads 4 --context 64 --batch 8 --steps 3000 \
    --lr 2 --warmup 100 --clip 1 --t0-share 0.75 --eval-every 150 --eval-windows 512 "$@"
