#!/usr/bin/env bash
# transformers 4.57, in a folder of its own, for the tests marked `transformers4`:
#     export MMCONVERT_TRANSFORMERS4=$(tests/with_transformers4/setup.sh PYTHON FOLDER)
# PYTHON has torch and all else; the folder shadows what differs. Prints the folder. Where it
# cannot be installed (no network), it says so on stderr, prints nothing and exits 0: the tests are
# then skipped.
set -uo pipefail
python=${1:?usage: setup.sh PYTHON FOLDER}
folder=${2:?usage: setup.sh PYTHON FOLDER}
list=$(dirname "$0")/constraints.txt

note() { echo "note: no transformers 4 here, so its tests are skipped: $1" >&2; exit 0; }
if ! cmp -s "$list" "$folder/constraints.txt"; then
  rm -rf "$folder"
  "$python" -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: \
    --target "$folder" -r "$list" >&2 || note "$(head -n 1 "$list") cannot be installed"
  cp "$list" "$folder/"
fi
cd "$folder" && pwd
