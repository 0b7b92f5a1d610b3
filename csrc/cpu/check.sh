#!/usr/bin/env bash
# The C++ kernels for the CPU: no warning for any instruction set they are compiled for, and their tests with AddressSanitizer and
# UndefinedBehaviorSanitizer in them. check.sh BUILD_FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
build=$1
mkdir -p "$build"
command -v g++ >/dev/null || { echo "csrc/cpu: SKIPPED, g++ is not in PATH"; exit 0; }
case $(uname -m) in x86_64) kinds=(x86-64 x86-64-v3 x86-64-v4) ;; *) kinds=(native) ;; esac
for kind in "${kinds[@]}"; do
    for source in "$root"/csrc/cpu/*.cpp; do
        g++ -std=c++20 -O3 -march="$kind" -fopenmp -Wall -Wextra -Werror -Wno-psabi -c "$source" -o "$build/out.o"
    done
    echo "csrc/cpu: no warning for $kind"
done
cd "$root"
LD_PRELOAD=$(g++ -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 OMP_NUM_THREADS=1 \
    CXX="g++ -fsanitize=address,undefined -fno-sanitize-recover -g -O1" \
    "${PYTHON:-.venv/bin/python}" -m pytest -q -p no:cacheprovider tests/kernels/test_cpu_rows.py tests/kernels/test_cascade_decode.py \
    tests/kernels/test_sampling.py -k "not interpreter and not hopper and not compiler and not compiled_once" >"$build/sanitized.log" 2>&1 ||
    { cat "$build/sanitized.log"; exit 1; }
tail -1 "$build/sanitized.log"
