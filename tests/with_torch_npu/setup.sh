#!/usr/bin/env bash
# The real torch_npu, in a folder of its own, for the tests marked `npu_wheel`:
#     export MMCONVERT_NPU_WHEEL=$(tests/with_torch_npu/setup.sh PYTHON FOLDER)
# PYTHON has torch; the wheel is of the same version, and comes without what it depends on. Prints
# the folder. Where the wheel cannot be installed (none for this machine or this torch, no
# network), it says so on stderr, prints nothing and exits 0: the tests are then skipped.
set -uo pipefail
python=${1:?usage: setup.sh PYTHON FOLDER}
folder=${2:?usage: setup.sh PYTHON FOLDER}

note() { echo "note: no torch_npu here, so its tests are skipped: $1" >&2; exit 0; }
version=$("$python" -c 'from importlib.metadata import version; print(version("torch").split("+")[0])') ||
  note "$python has no torch"
if ! ls -d "$folder"/torch_npu-"$version"* >/dev/null 2>&1; then
  rm -rf "$folder"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --target "$folder" "torch-npu==$version.*" >&2 || note "no wheel for torch $version"
fi
cd "$folder" && pwd
