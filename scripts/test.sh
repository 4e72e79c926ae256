#!/usr/bin/env bash
# Makes the test environment and runs every check: ruff, the type checker and the test suite.
#
#     bash scripts/test.sh [arguments of pytest]
#
# Installation takes a few minutes the first time (PyTorch is among the judges), the checks about 25 on 2 CPU cores.
# Exit status 0 = all passed. Safe to run again: nothing is installed twice.

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
started=$SECONDS

if has_nvidia_gpu; then make_environment test,cuda; else make_environment test; fi

results=()
failed=0
step() {
    local name="$1" start=$SECONDS verdict=passed
    shift
    say "$name"
    "$@" || { verdict=FAILED; failed=1; }
    results+=("$(printf '%-28s %-7s %4d s' "$name" "$verdict" $((SECONDS - start)))")
}

export PATH="$VENV/bin:$PATH"
step "SmolLM2 weights" fetch_smollm2
step "llama.cpp's libraries" fetch_llama_cpp
step "ruff check" ruff check --output-format concise .
step "ruff format --check" ruff format --check --output-format concise .
step "type check (pyrefly)" pyrefly check --summarize-errors
# Two processes, each with whole files: fixtures and compiled steps are shared within a file. In the order of collection,
# which begins with the long ones (tests/conftest.py).
step "pytest $*" python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"

say "Summary"
printf '   %s\n' "${results[@]}"
printf '   %-28s %-7s %4d s\n' "all" "$([ $failed = 0 ] && echo passed || echo FAILED)" $((SECONDS - started))
exit $failed
