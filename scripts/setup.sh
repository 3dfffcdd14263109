#!/usr/bin/env bash
# Installs what the build needs and is missing, and says so first: a C++ compiler, Open MPI and libclang from
# the distribution, and the pinned PyTorch wheel, which carries libtorch, into .venv. A second run does nothing.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=2.11.0
# What libtorch_cpu.so itself links to. With a GPU, pip brings these and the other CUDA libraries (3 GB).
CUDA_FOR_CPU=("nvidia-cuda-runtime==13.0.96" "nvidia-cuda-cupti==13.0.85")

say() { printf 'setup: %s\n' "$*"; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] || die "needs Linux on x86_64, found $(uname -sm)"
command -v cargo >/dev/null || die "needs cargo (Rust 1.88 or later), found none: install it with rustup"
command -v python3 >/dev/null || die "needs python3 (3.10 or later), found none"

# --- the distribution's packages ---------------------------------------------------------------------------------
packages=()
command -v c++ >/dev/null || packages+=(g++)
command -v mpicc >/dev/null && command -v mpirun >/dev/null || packages+=(openmpi-bin libopenmpi-dev)
# Not libclang-cpp, a library of its own that other packages bring.
libclang() {
  local in found
  for in in /usr/lib/llvm-*/lib /usr/lib/x86_64-linux-gnu; do
    for found in "$in"/libclang.so* "$in"/libclang-[0-9]*.so*; do [ ! -e "$found" ] || return 0; done
  done
  return 1
}
[ -n "${LIBCLANG_PATH:-}" ] || libclang || packages+=(libclang-dev)
if [ ! -x .venv/bin/python ] && ! python3 -c 'import ensurepip' 2>/dev/null; then packages+=(python3-venv); fi

if [ ${#packages[@]} -gt 0 ]; then
  command -v apt-get >/dev/null || die "missing: ${packages[*]}; this system has no apt-get, install their equivalents by hand"
  sudo=()
  if [ "$(id -u)" -ne 0 ]; then
    command -v sudo >/dev/null || die "missing: ${packages[*]}; run as root: apt-get install ${packages[*]}"
    sudo=(sudo)
  fi
  say "missing: ${packages[*]}; running apt-get install"
  "${sudo[@]}" apt-get update -qq
  DEBIAN_FRONTEND=noninteractive "${sudo[@]}" apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi

# --- libtorch ----------------------------------------------------------------------------------------------------
if [ -e /proc/driver/nvidia/version ] || command -v nvidia-smi >/dev/null; then device=cuda; else device=cpu; fi
stamp=".venv/lasp-torch-$TORCH-$device"
if [ ! -e "$stamp" ]; then
  say "installing the torch $TORCH wheel for $device into .venv ($([ $device = cuda ] && echo 'about 3 GB' || echo 'about 0.5 GB') to download)"
  [ -x .venv/bin/python ] || python3 -m venv .venv
  if [ $device = cuda ]; then
    .venv/bin/python -m pip install --quiet "torch==$TORCH"
  else
    .venv/bin/python -m pip install --quiet --no-deps "torch==$TORCH" "${CUDA_FOR_CPU[@]}"
  fi
  touch "$stamp"
fi
site=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
[ -e "$site/torch/lib/libtorch_cpu.so" ] || die "$site/torch/lib/libtorch_cpu.so is missing: remove .venv and run this again"
ln -sfn "${site#"$PWD/.venv/"}/torch" .venv/libtorch
