# Sourced by ci/sanitize; run by tests/test_native.py: bash ci/native.sh [SANITIZERS] builds tests/native and prints the
# program's path.

native_folder() { echo "build/native-$(tr , - <<<"${1:-plain}")"; }

build_native() { # [SANITIZERS, such as address,undefined]
  local folder
  folder=$(native_folder "$1")
  mkdir -p "$folder"
  # Paths relative to .venv: the build does not depend on which Python comes first in PATH.
  PATH=$PWD/.venv/bin:$PATH cmake -S . -B "$folder" -G Ninja -DSKBUILD_PROJECT_VERSION=0 -DPython_EXECUTABLE="$PWD/.venv/bin/python" \
    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBLSRDMA_NATIVE_TESTS=ON -DBLSRDMA_SANITIZE="$1" \
    && PATH=$PWD/.venv/bin:$PATH cmake --build "$folder" --target native_tests
}

if [[ ${BASH_SOURCE[0]} == "$0" ]]; then
  set -euo pipefail
  cd "$(dirname "${BASH_SOURCE[0]}")/.."
  build_native "${1:-}" >&2
  echo "$PWD/$(native_folder "${1:-}")/tests/native/native_tests"
fi
