#!/usr/bin/env bash
# Sees to the system packages that building Horovod needs: a C++ compiler, an MPI with its headers, Python's headers.
#
#   docker/install-system.sh [PYTHON]
#
# As root on a machine with apt it installs what is missing; anywhere else it prints what is missing and exits with 1.
set -euo pipefail
python=${1:-python3}

missing=()
command -v c++ >/dev/null || missing+=(g++)
command -v make >/dev/null || missing+=(make)
command -v mpirun >/dev/null && command -v mpicxx >/dev/null || missing+=(openmpi-bin libopenmpi-dev)
command -v "$python" >/dev/null || missing+=(python3)
"$python" - 2>/dev/null <<'PY' || missing+=(python3-venv python3-dev)
import os, sysconfig, ensurepip, venv
assert os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))
PY
[ ${#missing[@]} -eq 0 ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "install-system: installing ${missing[*]}"
    export DEBIAN_FRONTEND=noninteractive
    { apt-get update && apt-get install -y --no-install-recommends "${missing[@]}"; } > /tmp/hvdlarge-apt.$$ 2>&1 ||
        { tail -n 20 "/tmp/hvdlarge-apt.$$" >&2; echo "install-system: error: apt-get failed; its last lines are above" >&2; exit 1; }
    rm -f "/tmp/hvdlarge-apt.$$"
else
    cat >&2 <<TEXT
install-system: error: missing on this machine: ${missing[*]} (names of Debian and Ubuntu packages).
Needed are a C++17 compiler, make, Python >= 3.10 with its headers and venv, and Open MPI >= 4.1 with mpicc and mpicxx.
On a cluster: load the modules of the compiler and of Open MPI. With root: apt-get install ${missing[*]}
TEXT
    exit 1
fi
