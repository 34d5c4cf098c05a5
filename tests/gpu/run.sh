#!/usr/bin/env bash
# On a machine with an NVIDIA GPU, nvcc and this repository: build the CUDA library, run the benchmarks, every op and parity test on the
# GPU, and the sanitizers on the op tests; a short table comes last.
#   tests/gpu/run.sh [--no-bench] [--no-tests] [--no-sanitizer] [--libraries DIR]
# --libraries takes libtensor_ops.so and libtensor_ops_cuda.so from DIR instead of building them. PYTHON and OUT may be set: the
# interpreter, a folder for logs. With pytest-xdist the tests run side by side.
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu}
mkdir -p "$out"
bench=1 tests=1 sanitize=1 libraries=
while (($#)); do
    case $1 in
    --no-bench) bench=0 ;;
    --no-tests) tests=0 ;;
    --no-sanitizer) sanitize=0 ;;
    --libraries) libraries=$2; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
    esac
    shift
done

package=$out/package/inference_pio
mkdir -p "$package/_native/include"
if [ -z "$libraries" ]; then
    echo "== build"
    archs=${PIO_CUDA_ARCHS:-}
    cmake -S native -B "$out/cmake" -DPIO_CUDA=$([ -n "$archs" ] && echo ON || echo AUTO) -DPIO_CUDA_ARCHS="$archs" >"$out/cmake.log" 2>&1 &&
        cmake --build "$out/cmake" -j >>"$out/cmake.log" 2>&1 || { tail -30 "$out/cmake.log"; exit 1; }
    libraries=$out/libraries
    mkdir -p "$libraries"
    cp "$out"/cmake/libtensor_ops.so "$out"/cmake/cuda/libtensor_ops_cuda.so "$libraries/"
fi
cp "$libraries"/libtensor_ops*.so "$package/_native/"
cp native/include/tensor_ops.h "$package/_native/include/"
for floor in lsp_server engine models native; do ln -sfn "$PWD/$floor" "$package/$floor"; done
echo '__version__ = "0"' >"$package/__init__.py"
mkdir -p "$out/package/inference_pio-0.dist-info"
printf 'Metadata-Version: 2.1\nName: inference-pio\nVersion: 0\n' >"$out/package/inference_pio-0.dist-info/METADATA"
"$python" - >"$out/package/inference_pio-0.dist-info/entry_points.txt" <<'PY'
import tomllib
points = tomllib.load(open("pyproject.toml", "rb"))["project"]["entry-points"]["inference_pio.models"]
print("[inference_pio.models]", *(f"{name} = {value}" for name, value in points.items()), sep="\n")
PY
export PYTHONPATH=$out/package:${PYTHONPATH:-}

results=()
check() {   # name, command...: run it, keep its log, remember how it ended
    local name=$1 log="$out/$1.log"
    shift
    if "$@" >"$log" 2>&1; then results+=("ok      $name: $(grep -E 'passed|ERROR SUMMARY|hazard' "$log" | tail -1)")
    else results+=("FAILED  $name: $(grep -E 'passed|failed|ERROR SUMMARY|Error' "$log" | tail -1)   ($log)"); fi
}
if ((bench)); then
    for model in qwen3_4b_instruct_2507 qwen3_0_6b; do
        for weights in bf16 q4_0 fp8_e4m3; do
            "$python" models/$model/benchmarks/benchmark_inference.py --device cuda --weights $weights 2>&1 | tee "$out/bench-$model-$weights.log"
        done
    done
    flagship=models/qwen3_coder_next/benchmarks
    "$python" $flagship/benchmark_inference.py --device cuda --layers 48 --prefill 1024 2048 --context 1024 8192 2>&1 | tee "$out/bench-flagship.log"
    "$python" $flagship/benchmark_keystrokes.py --device cuda --layers 48 2>&1 | tee "$out/bench-keystrokes.log"
    "$python" $flagship/benchmark_loading.py --device cuda --layers 12 --folder /dev/shm 2>&1 | tee "$out/bench-loading.log"
fi
if ((tests)); then
    beside=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 8")
    check native "$python" -m pytest tests/native -q -p no:cacheprovider --device cuda $beside
    check parity "$python" -m pytest tests/parity tests/engine/test_checkpoints.py tests/engine/test_qwen3_coder_next_files.py -q -p no:cacheprovider \
        --device cuda --deselect tests/parity/test_smollm2.py $beside
fi
if ((sanitize)); then
    for tool in memcheck racecheck initcheck; do
        check "$tool" compute-sanitizer --tool $tool --error-exitcode 9 "$python" -m pytest tests/native -q -x -p no:cacheprovider --device cuda \
            -k "not isa and not frequencies and (17 or 33 or pasts5 or mixed or restrict or silu or 130)"
    done
fi
echo "== results"
if ((${#results[@]})); then printf '%s\n' "${results[@]}"; fi
! printf '%s\n' "${results[@]:-}" | grep -q FAILED
