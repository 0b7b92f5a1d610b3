#!/usr/bin/env bash
# The kernels under ThreadSanitizer: as they are, they must be clean; with any one of their barriers taken out, a race must be reported.
# races.sh BUILD_FOLDER [KERNEL [LINE ...]]: policy_rows or sample_tokens only; take out the barriers on these of its lines only.
set -uo pipefail
csrc=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$1
shift
mkdir -p "$build"
command -v "${CXX:-g++}" >/dev/null || { echo "races: SKIPPED, ${CXX:-g++} is not in PATH"; exit 0; }
# The sanitizer needs its address ranges free of randomised mappings on some kernels.
fixed=$(setarch -R true 2>/dev/null && echo "setarch -R" || true)
declare -A check=([policy_rows]=race_check [sample_tokens]=race_sample)

run() { # run NAME SOURCE CHECK [STOP]: with STOP, at the first report: threads that no longer agree may wait for each other for ever
    ${CXX:-g++} -x c++ -std=c++20 -O1 -g -Wall -Wextra -Werror -fsanitize=thread -pthread -I"$csrc" "$2" "$csrc/host/$3.cpp" -o "$build/$1" || exit 2
    TSAN_OPTIONS=halt_on_error=${4:-0} timeout 300 $fixed "$build/$1" >"$build/$1.log" 2>&1
}

for kernel in ${1:-policy_rows sample_tokens}; do
    source=$csrc/$kernel.cu
    run "$kernel" "$source" "${check[$kernel]}" || { cat "$build/$kernel.log"; echo "races: $kernel as it is fails"; exit 1; }
    echo "races: $kernel is clean"
    lines=${*:2}
    for line in ${lines:-$(grep -nE '^ .*(block|cluster)_sync\(\);' "$source" | grep -v 'no block ends' | cut -d: -f1)}; do
        name=${kernel}_without_$line
        sed "${line}s/\(block\|cluster\)_sync();/{}/" "$source" >"$build/$name.cu"
        cmp -s "$source" "$build/$name.cu" && { echo "races: line $line of $kernel has no barrier"; exit 2; }
        run "$name" "$build/$name.cu" "${check[$kernel]}" 1 && { echo "races: the barrier on line $line of $kernel can go unnoticed"; exit 1; }
        grep -q "WARNING: ThreadSanitizer: data race" "$build/$name.log" || { cat "$build/$name.log"; exit 1; }
        echo "races: $kernel without the barrier on line $line: a race is reported"
    done
done
