#!/usr/bin/env bash
# Trains a word-level LSTM on 2 ranks of this machine with NT-ASGD, which begins to average when the held-out loss stops
# falling. Needs Python >= 3.11 and git only; can be run again. Arguments go to launch/trainer/train_words.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_venv "$REPOSITORY/launch/requirements.txt"
cd "$REPOSITORY"
case " $* " in
    *" --resume"*) ;;
    *) set -- --overwrite "$@" ;;
esac
OMP_NUM_THREADS=1 exec "$VENV/bin/python" launch/launcher.py --standalone --nproc-per-node "${NPROC:-2}" \
    launch/trainer/train_words.py --stage 2 --out runs/nt_asgd "$@"
