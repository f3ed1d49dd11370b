#!/usr/bin/env bash
# The table of step_cost.py on one GPU, in float32 and bfloat16, meant to end in under nine minutes: results/step_cost_gpu.json.
# Needs JAX for the GPU, as in pip install "jax[cuda13]", and pip install -e ".[examples]". Options go to step_cost.py.
set -euo pipefail
cd "$(dirname "$0")/.."
python -c 'import jax; jax.devices("gpu")'
python -m benchmarks.step_cost --network transformer ResNet CNN MLP --precision float32 bfloat16 --workers "$(nproc)" --seconds 450 --name step_cost_gpu "$@"
