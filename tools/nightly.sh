#!/usr/bin/env bash
# Checks that take too long for .ci/run: several hours on two cores.
#
#     bash tools/nightly.sh [STEP ...]
#
# Without a STEP, all steps run, in a fresh virtual environment. A step that fails does not stop the
# others; the exit code is 1 if any failed. The benchmark writes to ./benchmark. These variables make a
# run shorter, for a test of the script itself:
#
#     SOAK_TRIES=20 HOSTILE_CASES=1000 bash tools/nightly.sh soak hostile
set -uo pipefail
cd "$(dirname "$0")/.."

steps=(memory uncompiled soak hostile literature benchmark frameworks browser integrations s3 packages matrix)

# Tests with freed memory overwritten: a tensor or array that outlives its buffer has wrong values.
step_memory() {
    MALLOC_PERTURB_=165 MALLOC_CHECK_=3 PYTHONMALLOC=debug python -m pytest -q \
        tests/gru tests/capture tests/storage tests/integration
}

# All tests without the compiled library.
step_uncompiled() {
    GRUTRACE_COMPILED=none python -m pytest -q -n auto --dist loadgroup
}

# Conversions of weights against the other libraries themselves.
step_frameworks() {
    pip install --quiet -e ".[test,frameworks]" && GRUTRACE_REQUIRE_PACKAGES=1 python -m pytest -q tests/conversion
}

# A browser clicks through the live view: chromium, which is not a package of pip, must be installed.
step_browser() {
    pip install --quiet -c constraints.txt -e ".[test,browser]" &&
        GRUTRACE_REQUIRE_PACKAGES=1 python -m pytest -q tests/view/live \
            tests/benchmarks/test_live_view_benchmark.py
}

# Traces in an object store, which moto simulates.
step_s3() {
    pip install --quiet -c constraints.txt -e ".[test,s3-server]" &&
        GRUTRACE_REQUIRE_PACKAGES=1 python -m pytest -q tests/storage/hdf5/test_s3.py
}

# Packages for an index: built, checked, and installed in empty environments.
step_packages() {
    bash tools/packages.sh
}

# Logs and callbacks with the libraries themselves.
step_integrations() {
    pip install --quiet -e ".[test,integrations]" &&
        GRUTRACE_REQUIRE_PACKAGES=1 python -m pytest -q tests/integrations
}

# Killed processes, failing disks, power loss, and readers of growing files.
step_soak() {
    python -m tools.soak --tries "${SOAK_TRIES:-2000}"
}

# Hostile files: those of the tests and more of their seed, and those of a new seed each day.
step_hostile() {
    python -m tools.hostile --cases 2000 --seed 1 &&
        python -m tools.hostile --cases "${HOSTILE_CASES:-20000}" --seed "$(date +%Y%m%d)"
}

# The examples that repeat published results, in full size.
step_literature() {
    local example
    for example in random_grus two_units sentiment chrono; do
        python "examples/literature/$example.py" || return 1
    done
}

# Other versions of Python, torch, NumPy and h5py, each in an environment of its own, which removes it.
step_matrix() {
    bash tools/matrix.sh
}

# The full benchmark, with the other packages.
step_benchmark() {
    pip install --quiet -c constraints.txt -e ".[test,peers]" && python -m benchmarks --long
}

if [ "$#" -eq 0 ]; then
    set -- "${steps[@]}"
fi
for step in "$@"; do
    if ! declare -F "step_$step" >/dev/null; then
        echo "error: expected steps among: ${steps[*]}; found: $step" >&2
        exit 2
    fi
done

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment" || exit 2
# shellcheck disable=SC1091
. "$environment/bin/activate"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1
pip install --quiet -c constraints.txt -e ".[test]" || exit 2

failed=()
for step in "$@"; do
    echo "== $step"
    "step_$step" || failed+=("$step")
done
if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
