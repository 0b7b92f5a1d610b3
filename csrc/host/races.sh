#!/usr/bin/env bash
# The row kernel under ThreadSanitizer: as it is, it must be clean; with any one of its barriers taken out, a race must be reported.
# races.sh BUILD_FOLDER [LINE ...]: take out the barriers on these lines of policy_rows.cu only (default: all).
set -uo pipefail
csrc=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$1
shift
mkdir -p "$build"
command -v "${CXX:-g++}" >/dev/null || { echo "races: SKIPPED, ${CXX:-g++} is not in PATH"; exit 0; }
# The sanitizer needs its address ranges free of randomised mappings on some kernels.
fixed=$(setarch -R true 2>/dev/null && echo "setarch -R" || true)

run() { # run NAME SOURCE
    ${CXX:-g++} -x c++ -std=c++20 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -pthread -I"$csrc" "$2" "$csrc/host/race_check.cpp" -o "$build/$1" || exit 2
    $fixed "$build/$1" >"$build/$1.log" 2>&1
}

run clean "$csrc/policy_rows.cu" || { cat "$build/clean.log"; echo "races: the kernel as it is fails"; exit 1; }
echo "races: clean"
lines=${*:-$(grep -nE '^ .*(block|cluster)_sync\(\);' "$csrc/policy_rows.cu" | grep -v 'no block ends' | cut -d: -f1)}
for line in $lines; do
    sed "${line}s/\(block\|cluster\)_sync();/{}/" "$csrc/policy_rows.cu" >"$build/without_$line.cu"
    cmp -s "$csrc/policy_rows.cu" "$build/without_$line.cu" && { echo "races: line $line has no barrier"; exit 2; }
    run "without_$line" "$build/without_$line.cu" && { echo "races: the barrier on line $line can go unnoticed"; exit 1; }
    grep -q "WARNING: ThreadSanitizer: data race" "$build/without_$line.log" || { cat "$build/without_$line.log"; exit 1; }
    echo "races: without the barrier on line $line: $(grep -c 'WARNING: ThreadSanitizer: data race' "$build/without_$line.log") reports"
done
