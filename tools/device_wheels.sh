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
"$python" -m pip download --quiet --dest "$folder" --only-binary=:all: \
    --python-version "$version" "${platforms[@]}" --platform manylinux2014_x86_64 \
    -r tools/device_requirements.txt

size=$(du -sm "$folder" | cut -f1)
if [ "$size" -gt "$limit_mib" ]; then
    echo "error: expected at most $limit_mib MiB of wheels, found $size MiB in $folder" >&2
    exit 1
fi
echo "$folder: $size MiB for Python $version"
