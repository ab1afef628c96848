#!/bin/sh
# What `make test-vm` needs beyond `make setup`: QEMU, a static busybox, and two stock Debian kernels.
#
# Changes this machine only by installing two packages; the kernels are unpacked under build/vm,
# never installed, so no boot loader is touched. Everything comes from the distribution through
# apt; running it again does nothing. Run it as root, or with the two packages installed as anybody.
set -eu
cd "$(dirname "$0")/.."
here=$PWD/build/vm
lists=$here/apt # a state of apt's own, so that this machine's list of sources stays as it is

if ! command -v apt-get >/dev/null 2>&1; then
    echo "vm-packages: this machine has no apt; see docs/testing.md for what is needed" >&2
    exit 1
fi
missing=""
command -v qemu-system-x86_64 >/dev/null 2>&1 || missing="qemu-system-x86"
# A dynamic busybox could not run before there is a root to load libraries from.
dpkg-query -W -f '${Status}' busybox-static 2>/dev/null | grep -q ' installed' ||
    missing="$missing busybox-static"
if [ -n "$missing" ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "vm-packages: run this as root, or install first:" $missing >&2
        exit 1
    fi
    apt-get update -q
    # shellcheck disable=SC2086 # a list of names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
fi

# Both kernels stand in the archive of Debian 12; its mirror is the one this machine already uses.
archive() {
    apt-get indextargets --format '$(REPO_URI)' 'Origin: Debian' 'Label: Debian' | head -n 1
}

private_apt() {
    tool=$1
    shift
    "$tool" -q -o "Dir::Etc::SourceList=$lists/sources.list" -o Dir::Etc::SourceParts=/dev/null \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null \
        -o "Dir::State::Lists=$lists/lists" -o Dir::State::Status=/dev/null \
        -o "Dir::Cache=$lists/cache" -o APT::Sandbox::User=root "$@"
}

# fetch NAME SUITE: unpack the newest kernel of a suite into build/vm/NAME.
fetch() {
    name=$1 suite=$2 folder=$here/$1
    [ -e "$folder/.ready" ] && return
    debian=$(archive)
    if [ -z "$debian" ] && [ "$(id -u)" -eq 0 ]; then
        apt-get update -q # a fresh image has no lists
        debian=$(archive)
    fi
    if [ -z "$debian" ]; then
        echo "vm-packages: apt knows no Debian archive here: the kernels cannot be fetched" >&2
        exit 1
    fi
    rm -rf "$folder" "$lists"
    mkdir -p "$folder" "$lists/lists/partial" "$lists/cache/archives/partial" "$lists/deb"
    keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    echo "deb [arch=amd64 signed-by=$keyring] $debian $suite main" >"$lists/sources.list"
    private_apt apt-get update
    package=$(private_apt apt-cache depends linux-image-amd64 |
        sed -n 's/^ *Depends: \(linux-image-[0-9].*-amd64\)$/\1/p' | head -n 1)
    (cd "$lists/deb" && private_apt apt-get download "$package")
    # Only what a small machine of QEMU needs: the whole tree would be 400 MB.
    dpkg-deb --fsys-tarfile "$lists"/deb/*.deb | tar -x -C "$folder" --wildcards \
        './boot/vmlinuz-*' './boot/config-*' './usr/share/doc/*/copyright' \
        './lib/modules/*/modules.*' './lib/modules/*/kernel/crypto/*' \
        './lib/modules/*/kernel/drivers/block/virtio*' './lib/modules/*/kernel/drivers/virtio/*' \
        './lib/modules/*/kernel/fs/9p/*' './lib/modules/*/kernel/fs/ext4/*' \
        './lib/modules/*/kernel/fs/*cache*' './lib/modules/*/kernel/fs/netfs/*' \
        './lib/modules/*/kernel/fs/jbd2/*' \
        './lib/modules/*/kernel/fs/overlayfs/*' './lib/modules/*/kernel/lib/*' \
        './lib/modules/*/kernel/net/9p/*'
    release=$(basename "$folder"/boot/vmlinuz-*)
    release=${release#vmlinuz-}
    busybox depmod -b "$folder" "$release"
    echo "$release" >"$folder/.ready"
    rm -rf "$lists"
}

fetch oldest bookworm
fetch newer bookworm-backports
for kernel in oldest newer; do
    echo "vm-packages: kernel $kernel is $(cat "$here/$kernel/.ready")"
done
