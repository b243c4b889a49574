#!/usr/bin/env bash
# Creates .venv from the lock, installs the package into it, and links the profiles. Does nothing when nothing changed.
#
# PYTHON chooses the interpreter (default: python3). pip obeys the user's own pip settings.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
stamp=.venv/complete

fail() {
    echo "setup: $1" >&2
    exit 1
}

# Snakemake looks for `--profile local` in the working directory, not in profiles/.
link_profile() {
    if [ "$(readlink "$1")" = "profiles/$1" ]; then
        return
    elif [ -e "$1" ] || [ -L "$1" ]; then
        echo "setup: ./$1 is not ours and stays; use --workflow-profile $1 in place of --profile $1" >&2
    else
        ln -s "profiles/$1" "$1"
    fi
}

link_profile local
link_profile slurm

key="$(cat envs/requirements.txt pyproject.toml | cksum)"
# The commands in .venv/bin name the path.
place="$PWD $python"
if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$key"$'\n'"$place" ]; then
    exit 0
fi

command -v "$python" >/dev/null || fail "$python not found; install Python 3.11 or newer, or set PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old; install Python 3.11 or newer, or set PYTHON=python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; on Debian and Ubuntu: sudo apt install python3-venv"

if [ ! -f .venv/started ]; then
    { [ ! -e .venv ] || rmdir .venv 2>/dev/null; } || fail ".venv was not made by this set-up; move it away"
    mkdir .venv
    touch .venv/started
elif [ "$(sed -n 2p "$stamp" 2>/dev/null)" != "$place" ]; then
    # An interrupted set-up, another place or another Python: start anew.
    find .venv -mindepth 1 ! -path .venv/started -delete
fi
rm -f "$stamp"
echo "setup: installing into .venv (a few minutes the first time)"
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --requirement envs/requirements.txt
.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
printf '%s\n' "$key" "$place" >"$stamp"
echo "setup: done; activate with: source .venv/bin/activate"
