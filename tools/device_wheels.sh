#!/usr/bin/env bash
# Collect the wheels that tools/device_check.sh needs beside torch, for a machine without an index.
#
#     bash tools/device_wheels.sh FOLDER [PYTHON_VERSION]
#
# PYTHON_VERSION is that of the other machine, such as 3.12; by default that of this one. The wheels are
# those of Linux on x86-64 and take less than 60 MiB. Run this where an index can be reached, and copy
# FOLDER to the other machine.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=${1:?error: expected a folder for the wheels}
python=${PYTHON:-python3}
version=${2:-$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')}
limit_mib=60

mkdir -p "$folder"
platforms=()
for glibc in 2_17 2_27 2_28; do
    platforms+=(--platform "manylinux_${glibc}_x86_64")
done
# What tests/test_cuda.py, benchmarks/cuda.py and their imports need, and what builds grutrace. numpy is
# no dependency of torch.
"$python" -m pip download --quiet --dest "$folder" --only-binary=:all: \
    --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 \
    "h5py>=3.10" "numpy>=1.26" "pytest>=8,<9.2" "typer>=0.12" "hypothesis>=6.100" "setuptools>=77"

size=$(du -sm "$folder" | cut -f1)
if [ "$size" -gt "$limit_mib" ]; then
    echo "error: expected at most $limit_mib MiB of wheels, found $size MiB in $folder" >&2
    exit 1
fi
echo "$folder: $size MiB for Python $version"
