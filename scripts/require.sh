#!/bin/sh
# Names everything this machine lacks, with the version needed, before any work is done.
# Prints the Python to use on stdout.
set -u
missing=""
need() { missing="${missing:+$missing; }$1"; }

python=""
for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11; do
    [ -n "$candidate" ] || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    need "Python >= 3.11 (package python3)"
elif ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
    need "the venv module of $python (package python3-venv)"
elif ! "$python" -c 'import ctypes; ctypes.CDLL("libseccomp.so.2")' 2>/dev/null; then
    need "libseccomp >= 2.5 (package libseccomp2)"
fi
command -v cc >/dev/null 2>&1 || need "a C compiler (package gcc)"
if ! command -v cargo >/dev/null 2>&1; then
    need "cargo >= 1.85 (rustup, or package cargo)"
else
    minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\)\..*/\1/p')
    [ "${minor:-0}" -ge 85 ] || need "cargo >= 1.85 (found $(cargo --version))"
fi
if [ -n "$missing" ]; then
    echo "make: this machine lacks: $missing" >&2
    exit 1
fi
if ! command -v npm >/dev/null 2>&1; then
    echo "note: no Node (>= 20, with npm) here: the MCP part of the demo and its tests are skipped" >&2
fi
echo "$python"
