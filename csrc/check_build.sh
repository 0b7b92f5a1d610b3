#!/usr/bin/env bash
# Builds the CUDA library for every architecture and reads back what the compiler made of it: no spills, no static shared memory (all of
# it is asked for at launch, within the device's limit), registers for two blocks of 512 threads. check_build.sh BUILD_FOLDER
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=$1
command -v nvcc >/dev/null || { echo "csrc: SKIPPED, nvcc is not in PATH: the CUDA library was not built"; exit 0; }
command -v cmake >/dev/null || { echo "csrc: SKIPPED, cmake is not in PATH: the CUDA library was not built"; exit 0; }
cmake --fresh -S "$root" -B "$build" >/dev/null
cmake --build "$build" --clean-first --verbose >"$build/log" 2>&1 || { cat "$build/log"; exit 1; }
entries=$(grep -c "Compiling entry function" "$build/log")
spills=$(grep -cE "[1-9][0-9]* bytes spill" "$build/log" || true)
echo "csrc: $entries kernels for $(grep -oE "for 'sm_[0-9a]+'" "$build/log" | sort -u | tr -d "'" | sed 's/for //' | paste -sd' '), $spills with spills"
[[ $entries -ge 12 && $spills -eq 0 ]] || { grep -B2 -E "[1-9][0-9]* bytes spill" "$build/log"; exit 1; }
# cuobjdump comes with the toolkit, or with triton.
cuobjdump=$(command -v cuobjdump || "${PYTHON:-$root/.venv/bin/python}" -c "import pathlib, triton
print(pathlib.Path(triton.__file__).parent / 'backends/nvidia/bin/cuobjdump')" || true)
[[ -x $cuobjdump ]] || { echo "csrc: SKIPPED, no cuobjdump: resource usage was not read"; exit 0; }
"$cuobjdump" --dump-resource-usage "$build/libfst_cuda.so" 2>&1 | grep -oE "REG:[0-9]+ STACK:[0-9]+ SHARED:[0-9]+ LOCAL:[0-9]+" | sort | uniq -c >"$build/usage"
cat "$build/usage"
awk -F'[: ]+' '{ for (i = 1; i < NF; ++i) { if ($i == "REG" && $(i + 1) > 64) bad = 1; if ($i == "SHARED" && $(i + 1) > 2048) bad = 1
    if ($i == "LOCAL" && $(i + 1) > 0) bad = 1; n += $i == "REG" } } END { exit bad || n == 0 }' "$build/usage" || { echo "csrc: over the limits"; exit 1; }
