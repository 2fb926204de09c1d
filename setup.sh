#!/bin/bash
# SPDX-License-Identifier: Apache-2.0
#
# Installs everything that building, running and testing drover needs on Debian 12.
#
#   sudo ./setup.sh            everything
#   sudo ./setup.sh --run      only what running drover on a host needs
#   sudo ./setup.sh --list     print the packages, change nothing
#
# It may be run again at any time; with everything there it takes well under a second and asks no
# package server. No service is started by an installation: the tests start their own libvirtd and
# sshd inside namespaces, and nobody wants a second one on the machine because of them.
#
# The tests' guest needs a kernel. It is unpacked into a cache directory, never installed:
# $DROVER_LAB_CACHE (default /var/cache/drover-lab)/kernel/{vmlinuz,modules,version}.
set -euo pipefail

BUILD=(g++ cmake ninja-build pkg-config ccache git
       libnbd-dev liburing-dev libvirt-dev librocksdb-dev libspdlog-dev libfmt-dev libgnutls28-dev
       libzstd-dev liblz4-dev libxxhash-dev libcli11-dev libtomlplusplus-dev nlohmann-json3-dev
       libpugixml-dev libexpected-dev libgtest-dev libgmock-dev libbenchmark-dev)
RUN=(qemu-system-x86 qemu-utils qemu-block-extra libvirt-daemon-system libvirt-clients
     libvirt-daemon-driver-qemu openssh-client libnbd-bin)
TEST=(openssl clang libclang-rt-14-dev clang-format clang-tidy
      debootstrap nbdkit python3 python3-libvirt python3-libnbd python3-pytest python3-pytest-xdist
      openssh-server tini busybox-static xfsprogs btrfs-progs e2fsprogs
      iproute2 util-linux mount procps kmod)
KERNEL_META=linux-image-cloud-amd64
CACHE=${DROVER_LAB_CACHE:-/var/cache/drover-lab}

die() { echo "setup.sh: $*" >&2; exit 1; }

want_kernel=1
packages=("${BUILD[@]}" "${RUN[@]}" "${TEST[@]}")
case ${1:-} in
  '') ;;
  --run) packages=("${RUN[@]}"); want_kernel=0 ;;
  --list) printf '%s\n' "${packages[@]}"; exit 0 ;;
  *) die "unknown argument '$1' (try --run or --list)" ;;
esac

missing=()
installed=$(dpkg-query -W -f '${db:Status-Abbrev}${Package}\n' 2>/dev/null | sed -n 's/^ii //p')
for p in "${packages[@]}"; do
  grep -qxF "$p" <<<"$installed" || missing+=("$p")
done
[[ $want_kernel = 1 && ! -e $CACHE/kernel/version ]] || want_kernel=0

if [[ ${#missing[@]} = 0 && $want_kernel = 0 ]]; then
  echo "setup.sh: everything is there"
  exit 0
fi
[[ $(id -u) = 0 ]] || die "must run as root (missing: ${missing[*]:-} $([[ $want_kernel = 0 ]] || echo 'the guest kernel'))"

# While packages are installed, invoke-rc.d asks this file whether it may start a service: 101 is no.
POLICY=/usr/sbin/policy-rc.d
saved=
tmp=
restore() {
  if [[ -n $saved ]]; then
    rm -f "$POLICY"
    if [[ $saved != none ]]; then mv "$saved" "$POLICY"; fi
    saved=
  fi
  if [[ -n $tmp ]]; then rm -rf "$tmp"; fi
}
trap restore EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

export DEBIAN_FRONTEND=noninteractive
apt-get -qq update

if [[ ${#missing[@]} -gt 0 ]]; then
  echo "setup.sh: installing ${missing[*]}"
  if [[ -e $POLICY || -L $POLICY ]]; then
    mv "$POLICY" "$POLICY.before-drover"
    saved=$POLICY.before-drover
  else
    saved=none
  fi
  printf '#!/bin/sh\nexit 101\n' >"$POLICY"
  chmod 755 "$POLICY"
  apt-get -qq -y -o Dpkg::Use-Pty=0 install --no-install-recommends "${missing[@]}" >/dev/null
fi

if [[ $want_kernel = 1 ]]; then
  image=$(apt-cache depends "$KERNEL_META" | sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n1)
  [[ -n $image ]] || die "$KERNEL_META depends on no kernel image: are the package lists complete?"
  echo "setup.sh: unpacking $image into $CACHE"
  mkdir -p "$CACHE"
  tmp=$(mktemp -d "$CACHE/.unpack.XXXXXX")
  chmod 755 "$tmp"
  # As root, without apt's own unprivileged download user, who may not write into this directory.
  (cd "$tmp" && apt-get -qq -o APT::Sandbox::User=root download "$image")
  dpkg -x "$tmp"/*.deb "$tmp/root"
  version=$(basename "$tmp"/root/lib/modules/*)
  mkdir "$tmp/kernel"
  cp "$tmp/root/boot/vmlinuz-$version" "$tmp/kernel/vmlinuz"
  mv "$tmp/root/lib/modules/$version" "$tmp/kernel/modules"
  echo "$version" >"$tmp/kernel/version"
  rm -rf "$CACHE/kernel"
  mv "$tmp/kernel" "$CACHE/kernel" # last: a setup that was interrupted leaves no half kernel
fi
echo "setup.sh: done"
