#!/usr/bin/env bash
# Check grutrace on a machine with a CUDA device, within 6 minutes, without an index.
#
#     bash tools/device_check.sh [FOLDER [WHEELS]]
#
# Uses the torch of the active Python. WHEELS is a folder made by tools/device_wheels.sh with what that
# Python lacks; without it, that Python needs grutrace with its extra test. Runs tests/test_cuda.py,
# traces a small model and times tracing against cuDNN. Writes FOLDER/device.json and FOLDER/device.md
# as it goes, and the output of each step beside them. FOLDER defaults to $OUT, or to ./device_check
# without it. DEVICE=cpu tries the check itself. Exit codes: 0 all passed, 1 something
# failed or ran out of time, 2 there is no such device or a package is missing.
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
folder=${1:-${OUT:-device_check}}
wheels=${2:-}
mkdir -p "$folder" || exit 2

if [ -n "$wheels" ]; then
    environment=$(mktemp -d)
    trap 'rm -rf "$environment"' EXIT
    "$python" -m venv "$environment" || exit 2
    # --system-site-packages would miss a torch that is in a virtual environment itself.
    "$python" -c 'import sys; print(*(p for p in sys.path if p.endswith("-packages")), sep="\n")' \
        >"$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torch.pth"
    python=$environment/bin/python
    "$python" -m pip install --quiet --no-index --find-links "$wheels" \
        -r tools/device_requirements.txt || exit 2
    # In place and with its version, compiled where the machine has a compiler.
    "$python" -m pip install --quiet --no-index --find-links "$wheels" --no-deps -e . || exit 2
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
# Not exec, so that the environment is removed.
timeout --kill-after=5 350 "$python" -m tools.device_check "$folder" --device "${DEVICE:-cuda}"
