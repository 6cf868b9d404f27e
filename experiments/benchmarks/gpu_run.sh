#!/usr/bin/env bash
# One run of at most eight minutes on an H100 or H200: correctness of all kernels, then times of kernels
# (ours and other packages'), of train steps, and of decoding with a 7B model. Sections compile
# concurrently and are timed one at a time. Run in the project's root, after gpu_prepare.sh.
# Results: $OUT/results.json.
#
# ONLY="tiles peers" runs only these sections; FLASHRNN=1 includes kernels that are built with nvcc;
# GPU_RUN_SMOKE=1 runs toy sizes on a CPU.
set -u
export GPU_RUN_START GPU_RUN_DIR=.gpu_run/work PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=3
export XLA_PYTHON_CLIENT_PREALLOCATE=false # the processes of all sections share the GPU's memory
GPU_RUN_START=$(date +%s)
OUT=${OUT:-.gpu_run/out}
python=${PYTHON:-python3}
module=experiments.benchmarks.gpu_run
logs=$GPU_RUN_DIR/log
limit=470 # seconds, after which sections are stopped
elapsed() { echo $(($(date +%s) - GPU_RUN_START)); }

rm -rf "$GPU_RUN_DIR" && mkdir -p "$logs" "$OUT" || exit
install() {
    "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target .gpu_run/site "$@"
}
if compgen -G '.gpu_run/wheels/*.whl' >/dev/null; then
    install $(ls .gpu_run/wheels/*.whl | grep -v -E '/(flax|optax)-') || exit
    # Keep an installed flax that is new enough: it may match the installed JAX, which is not ours.
    "$python" -c 'import flax, sys; sys.exit(tuple(map(int, flax.__version__.split(".")[:3])) < (0, 12, 8))' 2>/dev/null ||
        install .gpu_run/wheels/flax-*.whl .gpu_run/wheels/optax-*.whl
fi
export PYTHONPATH=$PWD/.gpu_run/site:$PWD
# jaxlib searches the PATH for the assembler of Triton calls.
triton_bin=$("$python" -c 'import pathlib, triton; print(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin")' 2>/dev/null)
export PATH=$PATH:/usr/local/cuda/bin:$triton_bin
"$python" -c 'import tests.workloads' || { echo "another package named 'tests' shadows the one of the project"; exit 1; }
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.max.sm,power.limit,memory.total --format=csv,noheader

names=() pids=()
start() { # log name, section, arguments
    local name=$1
    shift
    timeout -k 5 $((limit - $(elapsed))) "$python" -m $module "$@" >"$logs/$name" 2>&1 &
    names+=("$name") pids+=($!)
}
if [ -n "${ONLY:-}" ]; then
    for section in $ONLY; do start "$section" "$section"; done
else
    for part in 0 1 2 3 4 5; do start "correctness$part" correctness "$part" 6; done
    for section in other_correctness kernels other few_heads tiles exported slstm train decode peers; do start "$section" "$section"; done
fi

# Wait until every section has compiled or exited, at most four and a half minutes.
while :; do
    waiting=""
    for i in "${!names[@]}"; do
        [ -e "$GPU_RUN_DIR/ready.${names[$i]}" ] || { kill -0 "${pids[$i]}" 2>/dev/null && waiting+=" ${names[$i]}"; }
    done
    [ -z "$waiting" ] && break
    [ "$(elapsed)" -ge "${GO_AFTER:-270}" ] && { echo "not ready in time:$waiting"; break; }
    sleep 1
done
echo "compiled after $(elapsed) s"
touch "$GPU_RUN_DIR/go"
for i in "${!pids[@]}"; do
    wait "${pids[$i]}" || echo "${names[$i]} exited with $?: $(grep -v '^$' "$logs/${names[$i]}" | tail -1 | cut -c1-300)"
done
echo "timed after $(elapsed) s"

left=$((limit + 5 - $(elapsed)))
if [ "$left" -gt 60 ] && command -v ncu >/dev/null; then # profile the six mLSTM kernels of one gradient
    metrics=gpu__time_duration.sum,sm__throughput.avg.pct_of_peak_sustained_elapsed,sm__inst_executed_pipe_tensor.sum
    metrics+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active,lts__t_bytes.sum,dram__bytes.sum
    metrics+=,smsp__issue_active.avg.pct_of_peak_sustained_active,smsp__warps_active.avg.pct_of_peak_sustained_active
    metrics+=,launch__registers_per_thread,launch__occupancy_limit_registers
    timeout -k 5 "$left" ncu --clock-control none -k 'regex:states|outputs' --launch-skip 6 --launch-count 6 --csv \
        --page raw --metrics $metrics "$python" -m $module profile >"$OUT/ncu.csv" 2>"$logs/ncu" || echo "ncu exited with $?"
fi
"$python" -m $module summary "$OUT/results.json"
tar -czf "$OUT/logs.tar.gz" -C "$GPU_RUN_DIR" log
echo "finished after $(elapsed) s"
