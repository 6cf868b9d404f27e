#!/usr/bin/env bash
# Collects in .gpu_run what a GPU machine without package access needs: wheels, and with --exports the
# kernels compiled by a newer Triton. Run in the project's root; takes one minute, with --exports ten.
# PYTHON is an interpreter of the same version as on the GPU machine (default python3.12).
set -euo pipefail
version=${GPU_PYTHON_VERSION:-3.12}
mkdir -p .gpu_run/wheels
platforms=()
for glibc in 2_28 2_27 2_24 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
python3 -m pip download -q --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
    "${platforms[@]}" --platform manylinux2014_x86_64 -d .gpu_run/wheels \
    jax-triton==0.4.1 tyro==1.0.17 docstring-parser==0.18.0 typeguard==4.6.0 flax==0.12.12 optax==0.2.8 \
    mlstm-kernels==2.0.6 flash-linear-attention==0.6.0 fla-core==0.6.0 flashrnn==1.0.8
if [ "${1:-}" = --exports ]; then
    [ -x .venv-export/bin/python ] || "${PYTHON:-$(.ci/python "python$version")}" -m venv .venv-export
    .venv-export/bin/pip install -q jax==0.11.2 jaxlib==0.11.2 jax-cuda13-plugin==0.11.2 jax-cuda13-pjrt==0.11.2 \
        jax-triton==0.4.1 triton==3.9.0 nvidia-cuda-nvcc==13.5.37 flatbuffers jaxtyping flax optax orbax-checkpoint tyro rich matplotlib
    .venv-export/bin/python -m experiments.benchmarks.gpu.export .gpu_run/exports
fi
du -sh .gpu_run
echo 'On the GPU machine, in a checkout that contains .gpu_run: bash experiments/benchmarks/gpu_run.sh'
