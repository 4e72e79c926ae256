#!/usr/bin/env bash
# Trains a small vision-language model, from random weights, to read numbers in images.
#
#     bash scripts/quickstart_vision.sh [OUTPUT_FOLDER]
#
# 2 CPU cores: about 3 minutes after installation, 2 GB of memory. On a host with an NVIDIA GPU it uses the GPU.
# Makes .venv (Python >= 3.12, found or fetched through uv) in this folder; safe to run again.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if has_nvidia_gpu; then
    say "Found an NVIDIA GPU"
    make_environment cuda
else
    say "No NVIDIA GPU found; the quickstart runs on the CPU"
    make_environment ""
fi

say "Learning to read: python scripts/examples/vision.py $*"
exec "$VENV/bin/python" "$ROOT/scripts/examples/vision.py" "$@"
