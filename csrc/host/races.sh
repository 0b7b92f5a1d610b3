#!/usr/bin/env bash
# The sampler under ThreadSanitizer: as it is, it must be clean; with any one of its barriers taken out, a race must be reported.
# races.sh BUILD_FOLDER [LINE ...]: take out the barriers on these of its lines only.
set -uo pipefail
csrc=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$1
shift
mkdir -p "$build"
command -v "${CXX:-g++}" >/dev/null || { echo "races: SKIPPED, ${CXX:-g++} is not in PATH"; exit 0; }
# The sanitizer needs its address ranges free of randomised mappings on some kernels.
fixed=$(setarch -R true 2>/dev/null && echo "setarch -R" || true)

run() { # run NAME SOURCE [STOP]: with STOP, at the first report: threads that no longer agree may wait for each other for ever
    ${CXX:-g++} -x c++ -std=c++20 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -pthread -I"$csrc" "$2" "$csrc/host/race_sample.cpp" -o "$build/$1" || exit 2
    TSAN_OPTIONS=halt_on_error=${3:-0} timeout 300 $fixed "$build/$1" >"$build/$1.log" 2>&1
}

source=$csrc/sample_tokens.cu
run sample_tokens "$source" || { cat "$build/sample_tokens.log"; echo "races: the sampler as it is fails"; exit 1; }
echo "races: the sampler is clean"
lines=$*
for line in ${lines:-$(grep -nE '^ .*(block|cluster)_sync\(\);' "$source" | grep -v 'no block ends' | cut -d: -f1)}; do
    name=sample_tokens_without_$line
    sed "${line}s/\(block\|cluster\)_sync();/{}/" "$source" >"$build/$name.cu"
    cmp -s "$source" "$build/$name.cu" && { echo "races: line $line has no barrier"; exit 2; }
    run "$name" "$build/$name.cu" 1 && { echo "races: the barrier on line $line can go unnoticed"; exit 1; }
    grep -q "WARNING: ThreadSanitizer: data race" "$build/$name.log" || { cat "$build/$name.log"; exit 1; }
    echo "races: without the barrier on line $line: a race is reported"
done
