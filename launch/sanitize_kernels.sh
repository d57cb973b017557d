#!/usr/bin/env bash
# Runs the tests of the native kernels under the address and undefined-behaviour sanitizers.
# PYTHON names the interpreter, CXX the compiler (g++ by default); arguments go to pytest.
#
# Example: PYTHON=.venv/bin/python launch/sanitize_kernels.sh -k gradients
set -euo pipefail
cd "$(dirname "$0")/.."

compiler=${CXX:-g++}
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
export CXX="$compiler" XDG_CACHE_HOME="$cache" KMQ_JAX_NATIVE=1
export KMQ_JAX_NATIVE_FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g"
# The interpreter itself is not instrumented: the runtimes are loaded before it, and its own leaks do not count.
address=$("$compiler" -print-file-name=libasan.so)
undefined=$("$compiler" -print-file-name=libubsan.so)
export ASAN_OPTIONS="detect_leaks=0:abort_on_error=1:handle_segv=0" UBSAN_OPTIONS="print_stacktrace=1"
LD_PRELOAD="$address $undefined" "${PYTHON:-python}" -m pytest -n 0 -q tests/nn/test_conv.py tests/nn/test_channels.py "$@"
