# SPDX-License-Identifier: Apache-2.0
"""An installed operating system as a raw disk image: Debian, by debootstrap, in ext4. Made once and kept in
the lab's cache ($DROVER_LAB_CACHE)."""
from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Optional

SIZE = "4G"
SUITE = "bookworm"
# What a small server has beside the base system.
PACKAGES = "linux-image-cloud-amd64,openssh-server,python3,vim,perl,rsync"


class NoImage(Exception):
    """It cannot be made here; says why."""


def _run(words: list[str], what: str) -> str:
    p = subprocess.run(words, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                       env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"})
    if p.returncode != 0:
        raise NoImage(f"{what}: {' / '.join(p.stdout.strip().splitlines()[-2:])}")
    return p.stdout


def _mirror() -> Optional[str]:
    """Where this machine's apt has that suite's main archive from."""
    listed = _run(["apt-get", "indextargets", "--format", "$(ORIGIN) $(CODENAME) $(REPO_URI)", "Created-By: Packages"],
                  "apt-get indextargets")
    for line in listed.splitlines():
        words = line.split()
        if words[:2] == ["Debian", SUITE] and len(words) == 3:
            return words[2]
    return None


def os_image(cache: Path) -> Path:
    """The image, made now if it is not there yet (a few minutes). Raises NoImage."""
    image = cache / f"os-{SUITE}.raw"
    if image.exists():
        return image
    if not shutil.which("debootstrap"):
        raise NoImage("debootstrap is not installed (setup.sh)")
    mirror = _mirror()
    if mirror is None:
        raise NoImage(f"apt knows no archive of Debian {SUITE} (apt-get update?)")
    tree, making = cache / f".os-tree-{os.getpid()}", cache / f".os-{os.getpid()}.raw"
    try:
        # In a mount namespace of its own: what debootstrap mounts in the tree goes with it.
        _run(["unshare", "--mount", "--fork", "debootstrap", f"--include={PACKAGES}", SUITE, str(tree), mirror],
             "debootstrap")
        shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
        _run(["truncate", "-s", SIZE, str(making)], "truncate")
        _run(["mkfs.ext4", "-q", "-d", str(tree), str(making)], "mkfs.ext4")
        making.rename(image)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        making.unlink(missing_ok=True)
    return image
