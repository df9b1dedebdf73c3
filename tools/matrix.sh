#!/usr/bin/env bash
# Test grutrace with other versions of Python, torch, NumPy and h5py, each in its own environment.
#
#     bash tools/matrix.sh [--whole] [WORD ...]
#
# Prints one row of a table for each combination, and adds it to $MATRIX/matrix.md as it goes; the
# output of each is in $MATRIX too, ./matrix without it. A WORD selects the combinations that contain
# it: `bash tools/matrix.sh 2.4.1`. --whole runs all tests, with the extra "test", in place of the fast
# core. A Python that is missing is skipped, and the row says so. The exit code is 1 if anything failed.
# RUN is put in front of each run of tests, as in RUN="nice -n 10".
#
# pip takes torch from where it is set to look: several GB each, unless that is an index of builds for
# the CPU (PIP_EXTRA_INDEX_URL).
set -uo pipefail
cd "$(dirname "$0")/.."

# Python, torch, NumPy, h5py; "newest" is the newest that pip finds.
combinations=(
    "3.11 2.4.1 1.26.4 3.10.0"
    "3.10 2.4.1 2.0.2 3.11.0"
    "3.12 2.6.0 2.1.3 3.12.1"
    "3.12 2.9.1 newest 3.14.0"
    "3.11 2.13.0 newest newest"
    "3.13 2.13.0 newest newest"
    "3.12 2.14.1 newest newest"
    "3.12 newest newest newest"
    "3.14 newest newest newest"
)
# One run each, so that none takes long or much memory.
core=(tests/gru tests/capture tests/integration tests/storage/write tests/storage/hdf5
    tests/test_lattice.py tests/test_systems.py tests/test_torch_internals.py)
# What the core imports, beside what grutrace needs.
runners=("pytest>=8,<9.2" "pytest-xdist>=3.6" "hypothesis>=6.100" "expecttest>=0.2" "typer>=0.12"
    dask h5netcdf hdf5plugin netCDF4 pandas xarray)

folder=${MATRIX:-matrix}
mkdir -p "$folder" || exit 2
whole=
if [ "${1:-}" = --whole ]; then
    whole=1
    shift
fi
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 PYTHONUNBUFFERED=1

# A Python that runs: pyenv has commands for those that are not active, too, which fail.
python_of() {
    local candidate
    for candidate in "$(command -v "python$1")" "$HOME/.pyenv/versions/$1".*/bin/python; do
        if "$candidate" -c "" 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    uv python find "$1" 2>/dev/null
}

row() {
    echo "| $1 | $2 | $3 | $4 |" | tee -a "$folder/matrix.md"
}

requirement() {
    if [ "$2" = newest ]; then echo "$1"; else echo "$1==$2"; fi
}

# From the last lines of the runs, such as "3 passed, 1 skipped in 2.1s".
sum_of_counts() {
    awk '/^[0-9]+ (passed|failed|skipped|error).* in [0-9.]+s/ {
            sub(/ in .*/, "")
            count = split($0, parts, ", ")
            for (i = 1; i <= count; i++) {
                split(parts[i], words, " ")
                sub(/s$/, "", words[2])
                total[words[2]] += words[1]
            }
        }
        END {
            split("failed error passed skipped", order, " ")
            for (i = 1; i <= 4; i++)
                if (total[order[i]]) printf "%s%d %s", (n++ ? ", " : ""), total[order[i]], order[i]
        }'
}

# One combination, in $environment.
try() {
    local python=$1 name="py$1-torch$2" found each code=0 tests=("${core[@]}") install=("${runners[@]}" -e .)
    if [ -n "$whole" ]; then
        tests=(tests) install=(-e ".[test]")
    fi
    found=$(python_of "$python")
    if [ -z "$found" ]; then
        row "$(date -u +%F)" "Python $python, torch $2" "" "not tried: no Python $python"
        return 0
    fi
    "$found" -m venv "$environment" &&
        "$environment/bin/pip" install --quiet "$(requirement torch "$2")" "$(requirement numpy "$3")" \
            "$(requirement h5py "$4")" "${install[@]}" >"$folder/$name.log" 2>&1 || {
        row "$(date -u +%F)" "Python $python, torch $2, NumPy $3, h5py $4" "" "not installed"
        return 1
    }
    found=$("$environment/bin/python" -m tools.matrix_row) || found="| "
    for each in "${tests[@]}"; do
        # shellcheck disable=SC2086
        ${RUN:-} "$environment/bin/python" -m pytest -q -n auto --dist loadgroup -p no:cacheprovider "$each" \
            >>"$folder/$name.log" 2>&1 || code=1
    done
    row "$(date -u +%F)" "${found%|*}" "${found#*|}" "$(sum_of_counts <"$folder/$name.log")"
    return "$code"
}

{
    echo "| date | versions | what they change | tests |"
    echo "|---|---|---|---|"
} | tee "$folder/matrix.md"
failed=0
for combination in "${combinations[@]}"; do
    for word in "${@:-}"; do
        if [[ " $combination " == *"$word"* ]]; then
            environment=$(mktemp -d)
            # shellcheck disable=SC2086
            try $combination || failed=1
            rm -rf "$environment"
            break
        fi
    done
done
exit "$failed"
