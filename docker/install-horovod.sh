#!/usr/bin/env bash
# Builds and installs Horovod and mpi4py for one Python, against the torch and the MPI that this Python will use.
#
#   docker/install-horovod.sh [PYTHON]          PYTHON: the interpreter to install into (default: python3)
#
# Needed beforehand: torch in that Python, a C++ compiler, and an MPI with its compilers (mpicc, mpicxx) on PATH.
# The newest Horovod release, 0.28.1, does not build against torch >= 2.1 as it is: it asks for C++14 in exactly two
# places, and torch's headers refuse that. This script changes those two lines and nothing else. The wheels are
# kept in a cache whose key holds everything they depend on, so that a second installation takes seconds.
#
#   HVDLARGE_WHEEL_CACHE   where built wheels are kept      (default: ~/.cache/hvdlarge/wheels)
#   PIP_FIND_LINKS         a folder of archives and wheels, for a machine without a package index (with PIP_NO_INDEX=1): put
#                          Horovod's source release, mpi4py's wheel and what they need into it with `pip download`
#   HOROVOD_GPU_OPERATIONS NCCL, or none: gradients of GPUs then go through the host's memory, as two workers on one GPU need.
#                          Default: NCCL where torch is built for CUDA and nvcc is there, else none
#   HOROVOD_CUDA_HOME      the CUDA toolkit                 (default: CUDA_HOME, the one of nvcc on PATH, /usr/local/cuda)
#   HOROVOD_NCCL_*         where NCCL is                    (default: the one that torch was installed with)
#   HOROVOD_*              Horovod's other build variables pass through
#   MAKEFLAGS              compile jobs                     (default: -j<cores>)
#
# Exit code: 0 done; 1 something is missing or the result does not work (one message says what).
set -euo pipefail

horovod_version=0.28.1
horovod_sha256=92a43f5a94c43907a56805bad15f19700c62ffc83b7ca483f9e104e229f67ef0
mpi4py_version=4.1.2

python=${1:-python3}
cache=${HVDLARGE_WHEEL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hvdlarge/wheels}

say() { printf 'install-horovod: %s\n' "$*"; }
die() { printf 'install-horovod: error: %s\n' "$*" >&2; exit 1; }
pip() { "$python" -m pip --disable-pip-version-check "$@"; }

# MPI must be loud, PyTorch must be loud; what is not used must not be picked up by chance (a failed part would
# otherwise be left out silently and show up as a missing extension at the first import).
export HOROVOD_WITH_MPI=1 HOROVOD_WITH_PYTORCH=1
export HOROVOD_WITHOUT_GLOO=1 HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1
export MAKEFLAGS=${MAKEFLAGS:--j$(getconf _NPROCESSORS_ONLN)}

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || die "$python is missing or older than Python 3.10"
"$python" -c 'import torch' 2>/dev/null || die "torch is not installed in $python; install torch first, Horovod is built against it"
command -v mpicxx >/dev/null || die "mpicxx is not on PATH; install an MPI with its headers (Debian: openmpi-bin libopenmpi-dev)"
command -v c++ >/dev/null || die "no C++ compiler on PATH (Debian: g++)"

# GPU operations: from the same CUDA release and the same NCCL as torch's, since two of either in one process do not work together.
torch_cuda=$("$python" -c 'import torch; print(torch.version.cuda or "")' 2>/dev/null)
gpu=${HOROVOD_GPU_OPERATIONS:-}
cuda_home=${HOROVOD_CUDA_HOME:-${CUDA_HOME:-}}
if [ -z "$cuda_home" ]; then
    nvcc=$(command -v nvcc || true)
    [ -z "$nvcc" ] && cuda_home=/usr/local/cuda || cuda_home=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
fi
nvcc=$cuda_home/bin/nvcc
if [ -z "$gpu" ]; then
    if [ -n "$torch_cuda" ] && [ -x "$nvcc" ]; then gpu=NCCL; else gpu=none; fi
    if [ -n "$torch_cuda" ] && [ $gpu = none ]; then
        say "torch is built for CUDA $torch_cuda, but there is no nvcc in $cuda_home: this Horovod will train on CPUs only"
        say "for GPUs: install the CUDA toolkit $torch_cuda and set HOROVOD_CUDA_HOME to its folder"
    fi
fi
unset HOROVOD_GPU_OPERATIONS
nccl=none
case $gpu in
    none)
        # With the toolkit Horovod still knows when a GPU's gradients are ready to be copied; without it the engine refuses GPUs.
        if [ -n "$torch_cuda" ] && [ -x "$nvcc" ]; then
            export HOROVOD_CUDA_HOME=$cuda_home CUDA_HOME=$cuda_home
        fi
        ;;
    NCCL | MPI)
        [ -n "$torch_cuda" ] || die "HOROVOD_GPU_OPERATIONS=$gpu, but torch in $python is not built for CUDA"
        [ -x "$nvcc" ] || die "HOROVOD_GPU_OPERATIONS=$gpu needs nvcc, which is not in $cuda_home/bin; set HOROVOD_CUDA_HOME"
        nvcc_cuda=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
        [ "${nvcc_cuda%%.*}" = "${torch_cuda%%.*}" ] ||
            die "$nvcc is CUDA $nvcc_cuda and torch is built for CUDA $torch_cuda: the first numbers must agree; set HOROVOD_CUDA_HOME"
        export HOROVOD_GPU_OPERATIONS=$gpu HOROVOD_CUDA_HOME=$cuda_home CUDA_HOME=$cuda_home PATH="$cuda_home/bin:$PATH"
        ;;
    *) die "HOROVOD_GPU_OPERATIONS=$gpu: one of NCCL, MPI, none" ;;
esac
if [ "$gpu" = NCCL ] && [ -z "${HOROVOD_NCCL_HOME:-}${HOROVOD_NCCL_INCLUDE:-}${HOROVOD_NCCL_LIB:-}" ]; then
    # The NCCL that torch was installed with; empty for a torch that brings its own inside (then the toolkit's folders are searched).
    nccl=$("$python" -c 'import importlib.util as u; s = u.find_spec("nvidia.nccl"); print(*s.submodule_search_locations)' 2>/dev/null) || nccl=
fi

# The setting of the build, spelt out: the key of the cache, and the answer to "what is this wheel made for?".
recipe=$(
    "$python" - <<'PY'
import platform, sys, sysconfig, torch
print("python", sysconfig.get_config_var("SOABI") or sys.version.split()[0], platform.machine())
print("torch", torch.__version__, "cuda", torch.version.cuda, "hip", torch.version.hip)
PY
    echo "mpi $(mpicxx --showme:version 2>/dev/null || mpicxx -v 2>&1 | head -n 1) at $(command -v mpicxx)"
    echo "compiler $(c++ -dumpfullversion -dumpversion) libc $(getconf GNU_LIBC_VERSION 2>/dev/null || echo other)"
    echo "horovod $horovod_version mpi4py $mpi4py_version standard 17"
    [ "$gpu" = none ] || echo "nvcc $nvcc_cuda nccl ${nccl:-of the toolkit}"
    env | grep -E '^HOROVOD_(WITH|GPU|NCCL|CUDA|ROCM|MPI|CPU|CCL|BUILD)' | sort
)
key=$(printf '%s' "$recipe" | sha256sum | cut -c1-16)
wheels=$cache/$key

horovod_wheel() { find "$wheels" -maxdepth 1 -name 'horovod-*.whl' -print -quit; }
mpi4py_wheel() { find "$wheels" -maxdepth 1 -name 'mpi4py-*.whl' -print -quit; }

# Python's traceback at the end of the log hides what CMake and the compiler said first.
show_errors() {
    grep -iE -A 6 'cmake error|error:|fatal|undefined reference|not found' "$1" | grep -v '^ *File "' | head -n 60 >&2 || tail -n 40 "$1" >&2
}

build_horovod() {
    local work=$1 archive=$1/archive/horovod-$horovod_version.tar.gz file
    say "fetching the source release of Horovod $horovod_version"
    # pip holds the archive against the hash before it runs anything in it.
    echo "horovod==$horovod_version --hash=sha256:$horovod_sha256" > "$work/horovod.txt"
    pip download --quiet --no-deps --no-build-isolation --no-binary :all: --require-hashes -d "$work/archive" \
        -r "$work/horovod.txt" || die "the source release of Horovod $horovod_version could not be fetched"
    echo "$horovod_sha256  $archive" | sha256sum --check --quiet - ||
        die "$archive is not the release of Horovod $horovod_version: its SHA-256 is not $horovod_sha256"
    tar -xzf "$archive" -C "$work"
    local source=$work/horovod-$horovod_version
    for file in "$source/CMakeLists.txt" "$source/horovod/torch/CMakeLists.txt"; do
        [ "$(grep -cF 'set(CMAKE_CXX_STANDARD 14)' "$file")" = 1 ] ||
            die "expected the line that asks for C++14 exactly once in ${file#"$work/"}"
        sed -i 's/set(CMAKE_CXX_STANDARD 14)/set(CMAKE_CXX_STANDARD 17)/' "$file"
    done
    if [ "$gpu" = NCCL ] && [ -e "$nccl/lib/libnccl.so.2" ]; then
        # The package has the library under its run-time name only; linkers look for the other.
        mkdir -p "$work/nccl" && ln -s "$nccl/lib/libnccl.so.2" "$work/nccl/libnccl.so"
        export HOROVOD_NCCL_INCLUDE=$nccl/include HOROVOD_NCCL_LIB=$work/nccl HOROVOD_NCCL_LINK=SHARED
    fi
    say "GPU operations: $gpu"
    # Headers that Horovod's sources use without naming them: up to GCC 12 they came along with others.
    export CXXFLAGS="${CXXFLAGS:-} -include string -include cstdint -include memory -include stdexcept -include limits"
    say "building Horovod $horovod_version (one and a half to five minutes on two cores)"
    local started=$SECONDS
    pip wheel --quiet --no-deps --no-build-isolation -w "$work/wheel" "$source" > "$work/horovod.log" 2>&1 ||
        { show_errors "$work/horovod.log"; die "Horovod did not build; the compiler's errors are above"; }
    say "built in $((SECONDS - started)) s"
}

# mpi4py's binary wheel looks for an MPI when it is imported. It is taken when that turns out to be the MPI that
# Horovod was linked with (checked at the end), which spares two and a half minutes; else mpi4py is built here.
get_mpi4py() {
    local work=$1 how=$2 started=$SECONDS
    if [ "$how" = source ]; then
        say "building mpi4py $mpi4py_version against the same MPI (two to three minutes on two cores)"
        MPICC=$(command -v mpicc) pip wheel --quiet --no-deps --no-cache-dir --no-binary mpi4py -w "$work/wheel" \
            "mpi4py==$mpi4py_version" > "$work/mpi4py.log" 2>&1 ||
            { show_errors "$work/mpi4py.log"; die "mpi4py did not build; the compiler's errors are above"; }
        say "built in $((SECONDS - started)) s"
    else
        pip wheel --quiet --no-deps -w "$work/wheel" "mpi4py==$mpi4py_version" || die "mpi4py $mpi4py_version could not be fetched"
    fi
}

# Moved into place whole: a copy that broke off is never taken for a wheel.
keep_wheels() {
    local work=$1 wheel
    for wheel in "$work"/wheel/*.whl; do
        cp "$wheel" "$wheels/.part" && mv "$wheels/.part" "$wheels/$(basename "$wheel")"
    done
}

install_wheels() {
    pip install --quiet 'setuptools>=77' "$(horovod_wheel)" "$(mpi4py_wheel)"
    # These two again by force: the same version number may have been built for another torch before.
    pip install --quiet --force-reinstall --no-deps "$(horovod_wheel)" "$(mpi4py_wheel)"
}

# Exit code 9: mpi4py does not fit, and building it here may help; 1: Horovod itself does not work.
one_mpi() {
    "$python" - <<'PY'
import os, re, sys
import horovod.torch as hvd
assert hvd.mpi_built(), "Horovod was built without MPI"
import mpi4py
mpi4py.rc.initialize = False
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    print("install-horovod: mpi4py does not load:", error)
    sys.exit(9)
maps = open("/proc/self/maps").read() if os.path.exists("/proc/self/maps") else ""
libraries = {os.path.realpath(path) for path in re.findall(r"\S*/libmpi\.so\S*", maps)}
if len(libraries) > 1:
    print(f"install-horovod: Horovod and mpi4py load two MPIs: {', '.join(sorted(libraries))}")
    sys.exit(9)
print("install-horovod: Horovod and mpi4py share", MPI.Get_library_version().split(",")[0].split("\n")[0])
PY
}

mkdir -p "$wheels"
exec 9> "$cache/.lock"
flock 9 2>/dev/null || true                      # two installations at once: the second finds the first one's wheels
if [ -z "$(horovod_wheel)" ] || [ -z "$(mpi4py_wheel)" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    # Horovod's build looks at the packages of this Python, so they must be there before it starts; setuptools
    # stays needed at run time from Python 3.12 on, where horovodrun would not start without it.
    pip install --quiet 'setuptools>=77' wheel packaging cffi cloudpickle psutil pyyaml
    cmake_version=$( (cmake --version 2>/dev/null || true) | sed -n 's/^cmake version //p')
    if [ "$(printf '%s\n3.13\n' "${cmake_version:-0}" | sort -V | head -n 1)" != 3.13 ]; then
        say "no CMake >= 3.13 on PATH: taking the one of the Python package"
        pip install --quiet cmake
        HOROVOD_CMAKE=$("$python" -c 'import cmake, os; print(os.path.join(cmake.CMAKE_BIN_DIR, "cmake"))')
        export HOROVOD_CMAKE
    fi
    [ -n "$(mpi4py_wheel)" ] || get_mpi4py "$work" binary
    [ -n "$(horovod_wheel)" ] || build_horovod "$work"
    printf '%s\n' "$recipe" > "$wheels/recipe.txt"
    keep_wheels "$work"
else
    say "using the wheels built earlier for this torch, Python and MPI ($wheels)"
fi

install_wheels
code=0
one_mpi || code=$?
if [ $code = 9 ] && [ ! -e "$wheels/mpi4py-from-source" ]; then
    say "mpi4py's binary wheel does not fit this MPI: building it from source"
    work=${work:-$(mktemp -d)}
    trap 'rm -rf "$work"' EXIT
    rm -f "$wheels"/mpi4py-*.whl "$work"/wheel/mpi4py-*.whl
    get_mpi4py "$work" source
    keep_wheels "$work"
    touch "$wheels/mpi4py-from-source"
    install_wheels
    code=0
    one_mpi || code=$?
fi
if [ $code != 0 ]; then
    rm -f "$wheels"/*.whl "$wheels/mpi4py-from-source"  # the next try builds anew
    die "Horovod is installed but does not work in this Python; the lines above say why"
fi
