#!/usr/bin/env bash
# Every row of the table of steps in docs/benchmarks.md, a process each, so that its peak of memory is its own:
#
#     bash scripts/bench/table.sh OUT [further arguments of step.py, as --model llama-3.2-1b]
#
# 45 minutes on an H200. OUT gets a folder with step.json for each row; what fails is named and the others go on.
set -u
out=${1:?usage: bash scripts/bench/table.sh OUT [arguments of step.py]}
shift
rows=(
    "2x2048 auto" "4x2048 auto" "8x2048 auto" "1x8192 auto" "1x32768 auto" "1x131072 auto"
    "2x2048 attention+residual+offload"
    "4x2048 attention+qkv+residual+offload"
    "1x8192 attention+qkv+residual+offload"
    "1x32768 attention+qkv+residual+offload"
    "1x131072 attention+offload"
    "4x2048 none+offload"
    "1x32768 none+offload"
    "4x2048 all+offload --compute_dtype fp8"
    "4x2048 attention+offload --compute_dtype fp8"
    "4x2048 auto --compute_dtype fp8"
)
export XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB=${XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB:-68} # 131,072 tokens send 65 GB to the host
export JAXTUNE_BENCH_CEILINGS=$out/ceilings.json # measured once
mkdir -p "$out"
failed=0
for row in "${rows[@]}"; do
    read -r batch remat options <<<"$row"
    # shellcheck disable=SC2086  # several words
    "${PYTHON:-python}" "$(dirname "$0")/step.py" --batch "$batch" --remat "$remat" $options "$@" \
        --out "$out/${row// /_}" || { echo "failed: $row" >&2; failed=1; }
done
exit $failed
