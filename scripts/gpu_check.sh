#!/usr/bin/env bash
# One command for a machine with a GPU: builds csrc, runs the tests that need a GPU, then the benchmarks with their peers, on this code
# tree itself (nothing is installed, no network is needed). The parts come in the order of what they tell: whether every kernel is right,
# then the head, tree attention, a decode step, the sampler and a whole step beside what `fst plan` predicts of it. Under ten minutes in all;
# every part has its own time limit.
#
#   bash scripts/gpu_check.sh [--list] [--dry-run] [--again] [PART ...]      no PART: all of them, in the order of --list
#
# A part that passed with this code is not run again without --again: what was cut off is continued by the same command.
#
# OUT=folder     where it writes as it goes (build/gpu_check): log.txt, summary.txt, table.txt, and NAME_cuda.json per benchmark
# WHEELS=folder  wheels of packages that this machine lacks (pytest, pytest-benchmark, pydantic, liger-kernel ...): unpacked without their
#                dependencies into a folder that only this run sees
# PYTHON=python3
# Exit code 1 if a part failed, timed out or was asked for and does not exist; 2 if the arguments or the machine are not fit for it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

TOTAL_S=590
PARTS=(build tests linear_policy_loss tree_attention decode_step sampling step linear_logprob training_step cascade_decode)
declare -A LIMIT_S=([build]=60 [tests]=120 [linear_policy_loss]=70 [tree_attention]=45 [decode_step]=60 [sampling]=20
    [step]=90 [linear_logprob]=65 [training_step]=40 [cascade_decode]=20)

refuse() {
    echo "gpu_check: $1" >&2
    exit 2
}

dry=0 again=0 asked=()
for argument in "$@"; do
    case $argument in
        --list)
            for part in "${PARTS[@]}"; do echo "$part  at most ${LIMIT_S[$part]} s"; done
            exit 0
            ;;
        --dry-run) dry=1 ;;
        --again) again=1 ;;
        -*) refuse "$argument is not an option; allowed: --list, --dry-run, --again" ;;
        *)
            [[ -n ${LIMIT_S[$argument]:-} ]] || refuse "$argument is not a part; allowed: ${PARTS[*]}"
            asked+=("$argument")
            ;;
    esac
done
parts=("${asked[@]}")
((${#parts[@]})) || parts=("${PARTS[@]}")

python=${PYTHON:-python3}
out=${OUT:-build/gpu_check}
packages=$(mktemp -d) || exit 2
trap 'rm -rf "$packages"' EXIT
export PYTHONPATH=$PWD:$PWD/kernels:$packages PATH=$packages/bin:$PATH
export PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1

exists() { [[ $1 == build || $1 == tests || -f benchmarks/$1.py ]]; }

# The command of a part; $architecture is that of the GPU.
command_of() {
    case $1 in
        build)
            if command -v cmake >/dev/null; then
                echo "cmake -S . -B build/csrc -DCMAKE_CUDA_ARCHITECTURES=$architecture-real && cmake --build build/csrc && ls -l build/csrc/libfst_cuda.so"
            else # what CMakeLists.txt does, for one architecture
                echo "mkdir -p build/csrc && nvcc -shared -O3 -std=c++17 -arch=sm_$architecture -cudart static -Xcompiler -fPIC -o build/csrc/libfst_cuda.so csrc/*.cu"
            fi
            ;;
        tests) echo "$python -m pytest -p no:cacheprovider -q --tb=short -m gpu $parallel tests/kernels tests/fst_fast/test_kv_pool.py tests/fst_fast/test_graphs.py tests/fst_fast/test_gpu_forward.py tests/fst_fast/test_liger.py" ;;
        *)
            if grep -q "^def test_" "benchmarks/$1.py"; then
                echo "$python -m pytest -p no:cacheprovider -q --tb=short benchmarks/$1.py --out ${out@Q}"
            else
                echo "$python -m benchmarks.$1 --out ${out@Q}"
            fi
            ;;
    esac
}

architecture="<of the GPU>" parallel="<-n 4 with pytest-xdist>"
if ((dry)); then
    for part in "${parts[@]}"; do
        if exists "$part"; then
            echo "$part (${LIMIT_S[$part]} s): $(command_of "$part")"
        else
            echo "$part: there is no benchmarks/$part.py"
        fi
    done
    exit 0
fi

mkdir -p "$out" || refuse "cannot write to OUT=$out"
if [[ -n ${WHEELS:-} ]]; then
    [[ -d $WHEELS ]] || refuse "WHEELS=$WHEELS is not a folder"
    "$python" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --target "$packages" "$WHEELS"/*.whl ||
        refuse "pip cannot unpack the wheels in WHEELS=$WHEELS"
fi
machine=$("$python" -c '
import importlib.util, sys
if importlib.util.find_spec("torch") is None: sys.exit("torch is not installed")
import torch
if not torch.cuda.is_available(): sys.exit("torch " + torch.__version__ + " finds no CUDA device")
major, minor = torch.cuda.get_device_capability()
lacking = [name for name in ("pytest", "pytest_benchmark", "pydantic") if importlib.util.find_spec(name) is None]
if lacking: sys.exit(" and ".join(lacking) + " not installed; carry the wheels and name their folder with WHEELS")
print(f"{major}{minor}" + ("a" if major == 9 else ""), torch.cuda.get_device_name() + ", torch " + torch.__version__, sep="\t")
' 2>&1 | tail -n 1)
[[ $machine == *$'\t'* ]] || refuse "$machine; nothing was run"
architecture=${machine%%$'\t'*}
# Files side by side: most of the time goes into compiling kernels.
if "$python" -c "import xdist" 2>/dev/null; then parallel="-n 4 --dist loadfile"; else parallel=""; fi

summary() { printf '%-20s %-10s %6s  %s\n' "$@" >>"$out/summary.txt"; }

# What a part's result depends on.
tree=$(find kernels csrc fst_fast benchmarks tests/kernels -name '*.py' -o -name '*.cu' -o -name '*.h' | sort | xargs cat | sha256sum | cut -c 1-16)
mkdir -p "$out/passed"

failed=0
begin=$SECONDS
touch "$out/log.txt"
echo "${machine#*$'\t'}" | tee -a "$out/log.txt" >"$out/summary.txt"
for part in "${parts[@]}"; do
    if ! exists "$part"; then
        if [[ " ${asked[*]} " == *" $part "* ]]; then status=failed failed=1; else status=absent; fi
        summary "$part" "$status" "" "there is no benchmarks/$part.py"
        continue
    fi
    if ((!again)) && [[ $(cat "$out/passed/$part" 2>/dev/null) == "$tree" ]]; then
        summary "$part" "passed" "" "before, with this code"
        continue
    fi
    left=$((TOTAL_S - (SECONDS - begin)))
    limit=$((LIMIT_S[$part] < left ? LIMIT_S[$part] : left))
    if ((limit < 5)); then
        summary "$part" failed "" "no time was left"
        failed=1
        continue
    fi
    command=$(command_of "$part")
    echo "== $part (at most $limit s): $command" | tee -a "$out/log.txt"
    started=$SECONDS
    timeout --kill-after=5 "$limit" bash -c "$command" 2>&1 | tee -a "$out/log.txt"
    case ${PIPESTATUS[0]} in
        0) status=passed && echo "$tree" >"$out/passed/$part" ;;
        124 | 137) status="timed out" failed=1 ;;
        *) status=failed failed=1 ;;
    esac
    summary "$part" "$status" "$((SECONDS - started)) s" "$(tail -n 1 "$out/log.txt" | cut -c 1-90)"
done
"$python" -m benchmarks.table "$out" >"$out/table.txt" 2>&1
echo
cat "$out/table.txt"
tee -a "$out/log.txt" <"$out/summary.txt"
exit "$failed"
