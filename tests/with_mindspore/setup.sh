#!/usr/bin/env bash
# An environment of its own for the CPU MindSpore that the tests marked `mindspore` compare with:
#     export MMCONVERT_MINDSPORE_PYTHON=$(tests/with_mindspore/setup.sh FOLDER)
# Prints the interpreter. Where MindSpore cannot be installed (no wheel for this machine, no
# network), it says so on stderr, prints nothing and exits 0: the tests are then skipped.
set -uo pipefail
folder=${1:?usage: setup.sh FOLDER}
version=${MINDSPORE_VERSION:-2.7.0}

note() { echo "note: no MindSpore here, so its tests are skipped: $1" >&2; exit 0; }
works() { "$folder/bin/python" -c 'import mindspore' >/dev/null 2>&1; }
# Wheels are there for these versions of Python only.
fits() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null; }

if ! works; then
  python=
  for name in ${MINDSPORE_PYTHON:-python3.11 python3.10 python3}; do
    if fits "$name"; then python=$name; break; fi
  done
  [ -n "$python" ] || note "it needs Python 3.10 or 3.11"
  "$python" -m venv "$folder" >&2 || note "$python makes no virtual environment"
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check \
    "mindspore==$version" >&2 || note "mindspore==$version cannot be installed"
  works || note "mindspore==$version is installed and cannot be imported"
fi
echo "$(cd "$folder" && pwd)/bin/python"
