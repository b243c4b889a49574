#!/usr/bin/env bash
# Resolves envs/requirements.in into envs/requirements.txt: exact versions of everything that gets installed.
#
# Run it with the oldest supported Python (3.11), whose releases all newer ones can install:
#     make lock PYTHON=python3.11
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --requirement envs/requirements.in
{
    cat <<'HEADER'
# The lock: exact versions of everything that `make setup` installs. Made by `make lock` from requirements.in.
#
# There are no hashes, and no CUDA packages: torch's file differs by platform, and where it needs CUDA libraries it
# names their versions itself.
HEADER
    "$work/venv/bin/python" -m pip list --format=freeze --exclude pip --exclude wheel |
        sed -E 's/\+[a-z0-9.]+$//' |
        { grep -Ev '^(cuda-|triton==|nvidia-(c|n))' || true; } |
        sort --ignore-case
} >"$work/requirements.txt"
mv "$work/requirements.txt" envs/requirements.txt
echo "envs/requirements.txt: $(grep -c == envs/requirements.txt) packages"
