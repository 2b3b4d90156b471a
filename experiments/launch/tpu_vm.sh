#!/bin/bash
# Fine-tune a patch on a TPU slice: the same command on every host, which find each other by themselves.
#   NAME=my-tpu ZONE=us-central2-b experiments/launch/tpu_vm.sh "MODEL = '/mnt/data/t0_3b'" "AXES = {'fsdp': 8}"
# Each argument is a gin binding. Wanted: the slice exists (gcloud compute tpus tpu-vm create), this repository is
# at ~/fishjax on each host with jax[tpu] in its .venv, and model, data and output lie on a disk or bucket that all
# hosts mount. Stopped (preempted) and started again, it goes on from the last saved state.
set -euo pipefail
: "${NAME:?the name of the TPU}" "${ZONE:?its zone}"
words=""; for b in "$@"; do words+=" --gin_bindings $(printf %q "$b")"; done
gcloud compute tpus tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command \
  "cd ~/fishjax && exec .venv/bin/fishjax train --coordinator auto --gin_file configs/t0_3b_ia3.gin$words"
