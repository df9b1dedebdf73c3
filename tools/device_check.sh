#!/usr/bin/env bash
# Run the CUDA tests and a short benchmark on a machine with a CUDA device.
#
#     bash tools/device_check.sh [FOLDER]
#
# Uses the active Python, which needs torch with CUDA and the packages of the extra "test". Writes
# FOLDER/device.md (a summary), FOLDER/tests.log and FOLDER/benchmark.md. FOLDER defaults to $OUT, or
# to ./device_check without it. Exit codes: 0 all tests passed, 1 a test or the benchmark failed,
# 2 no CUDA device.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${1:-${OUT:-device_check}}
mkdir -p "$folder" || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

if ! device=$("$python" -c '
import sys, torch
if not torch.cuda.is_available():
    sys.exit("torch %s finds no CUDA device" % torch.__version__)
p = torch.cuda.get_device_properties(0)
print("%s, %d GiB, torch %s, CUDA %s, cuDNN %s" % (
    p.name, p.total_memory >> 30, torch.__version__, torch.version.cuda,
    torch.backends.cudnn.version()))
'); then
    echo "error: expected a CUDA device" >&2
    exit 2
fi
echo "device: $device"

tests=passed
"$python" -m pytest -q -p no:cacheprovider -m cuda tests/test_cuda.py 2>&1 | tee "$folder/tests.log"
[ "${PIPESTATUS[0]}" -eq 0 ] || tests=FAILED

benchmark=done
"$python" -m benchmarks.cuda --pairs 5 --output "$folder/benchmark.md" || benchmark=FAILED

{
    echo "# Check on a CUDA device"
    echo
    echo "- device: $device"
    echo "- commit: $(git rev-parse --short HEAD 2>/dev/null || echo unknown)"
    echo "- tests/test_cuda.py: $tests ($(tail -n 1 "$folder/tests.log"))"
    echo "- benchmark: $benchmark"
    echo
    if [ -f "$folder/benchmark.md" ]; then
        cat "$folder/benchmark.md"
    fi
} >"$folder/device.md"
echo "report: $folder/device.md"
[ "$tests" = passed ] && [ "$benchmark" = "done" ]
