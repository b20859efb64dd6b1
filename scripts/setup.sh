# Sourced by the scripts beside it: a Python environment with genkit in it. Sets ROOT and PYTHON; leaves you in ROOT.
#
#   setup_genkit [EXTRA]     EXTRA: an extra of pyproject.toml, or several: "test,3d"
#
# Uses the active virtual environment, else makes .venv. Does nothing when what pyproject.toml asks for is installed.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

step() { printf '[%s] %s\n' "$(date +%H:%M:%S)" "$*" >&2; }
fail() { printf 'error: %s\n' "$*" >&2; exit 1; }
can_install() { [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; }
apt_install() { apt-get update -qq >&2 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >&2; }

find_python() {
  local name
  for name in python3 python3.13 python3.12 python3.11 python3.14 python; do
    if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      command -v "$name"
      return
    fi
  done
  fail "genkit needs Python 3.11 or newer; found $(python3 --version 2>/dev/null || echo none). Install one and run this again."
}

make_environment() {
  if [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON="$VIRTUAL_ENV/bin/python"
    [ -x "$PYTHON" ] || fail "VIRTUAL_ENV=$VIRTUAL_ENV has no bin/python; deactivate it, or unset VIRTUAL_ENV."
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
      fail "the active environment $VIRTUAL_ENV has $("$PYTHON" --version); genkit needs Python 3.11 or newer. Deactivate it to let this make .venv."
    "$PYTHON" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m ensurepip >/dev/null 2>&1 ||
      fail "the active environment $VIRTUAL_ENV has no pip; deactivate it to let this make .venv."
    return
  fi
  PYTHON="$ROOT/.venv/bin/python"
  # Without pip it was interrupted while it was made, or its Python is gone.
  if "$PYTHON" -m pip --version >/dev/null 2>&1; then return; fi
  local base version
  base="$(find_python)"
  version="$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
  if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
    can_install || fail "$base cannot make virtual environments; as root: apt-get install python$version-venv"
    step "installing python$version-venv"
    apt_install "python$version-venv" || fail "python$version-venv could not be installed; install it and run this again."
  fi
  step "making .venv with Python $version"
  rm -rf "$ROOT/.venv"
  "$base" -m venv "$ROOT/.venv"
}

# What an up-to-date installation was made from: dependencies, entry points, compiled sources, and the checkout that `genkit` leads to.
fingerprint() { { echo "$ROOT"; cat pyproject.toml setup.py genkit/kernels/*.h genkit/kernels/*/cpu.cpp 2>/dev/null || true; } | sha256sum | cut -d" " -f1; }

# Without a compiler genkit installs and runs by plain torch; with one its CPU kernels are many times faster.
ensure_compiler() {
  if command -v "${CXX:-g++}" >/dev/null; then return; fi
  if can_install; then
    step "installing g++"
    apt_install g++ && return
  fi
  step "no C++ compiler: the CPU kernels are left out, plain torch serves (install g++ and run this again to have them)"
}

install_genkit() {
  local extra="$1" log stamps wanted started line
  stamps="$("$PYTHON" -c 'import sys; print(sys.prefix)')"
  wanted="$(fingerprint)"
  if [ "$(cat "$stamps/genkit-installed-${extra:-core}" 2>/dev/null)" = "$wanted" ]; then return; fi
  ensure_compiler
  started=$SECONDS
  log="$stamps/genkit-install.log"
  step "installing genkit${extra:+ with extra $extra} into $stamps (the first time this downloads torch)"
  rm -f "$stamps"/genkit-installed-*
  "$PYTHON" -m pip install --no-input --disable-pip-version-check --progress-bar off -e ".${extra:+[$extra]}" 2>&1 | tee "$log" |
    while IFS= read -r line; do
      case "$line" in
        *Downloading*\ MB\)* | *Downloading*\ GB\)* | "Installing collected"* | ERROR* | error*) step "${line:0:110}" ;;
      esac
    done || { tail -n 15 "$log" >&2; fail "pip could not install genkit; the whole output is in $log"; }
  # Whatever extras it came with, the core is there too.
  printf '%s\n' "$wanted" | tee "$stamps/genkit-installed-core" >"$stamps/genkit-installed-${extra:-core}"
  step "installed after $((SECONDS - started)) s"
}

# open3d is the one package that expects system libraries its wheel does not bring.
install_libraries() {
  local libraries
  if "$PYTHON" -c 'import open3d' 2>/dev/null; then return; fi
  libraries="$("$PYTHON" -c 'from genkit.optional import LIBRARIES; print(*LIBRARIES["open3d"])')"
  can_install || fail "open3d needs system libraries; as root: apt-get install $libraries"
  step "installing system libraries for open3d"
  # shellcheck disable=SC2086  # a list of words
  apt_install $libraries || fail "these could not be installed: $libraries"
}

setup_genkit() {
  make_environment
  install_genkit "${1:-}"
  case ",${1:-}," in *,3d,*) install_libraries ;; esac
}
