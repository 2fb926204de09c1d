# SPDX-License-Identifier: Apache-2.0
"""The machine that measurements were made on: what it takes to judge them. (Not its name.)"""
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path


def _first_line(*cmd: str) -> str:
    try:
        p = subprocess.run(cmd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    except OSError:
        return "not here"
    return (p.stdout.strip().splitlines() or ["unknown"])[0]


def _dd(where: Path, mib: int) -> str:
    """How fast the disk below that folder is, past the page cache: "write 900 MB/s, read 1.1 GB/s"."""
    file = where / f".dd-{os.getpid()}"
    figures = []
    try:
        for name, words in (("write", ["if=/dev/zero", f"of={file}", "oflag=direct", "conv=fsync"]),
                            ("read", [f"if={file}", "of=/dev/null", "iflag=direct"])):
            p = subprocess.run(["dd", *words, "bs=1M", f"count={mib}"], text=True, capture_output=True,
                               env={**os.environ, "LC_ALL": "C"})
            found = re.search(r"([\d.]+ [kMGT]?B/s)", p.stderr)
            figures.append(f"{name} {found[1] if found else 'failed'}")
    finally:
        file.unlink(missing_ok=True)
    return ", ".join(figures)


def describe(where: Path, drover: Path, dd_mib: int = 1024) -> dict[str, str]:
    """What it is, and the versions of what is compared. `where`: the folder with the disk images."""
    where.mkdir(parents=True, exist_ok=True)
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    memory = re.search(r"MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "CPU": cpu[1] if cpu else os.uname().machine,
        "cores": str(os.cpu_count()),
        "RAM": f"{int(memory[1]) / 2**20:.0f} GiB" if memory else "unknown",
        "kernel": os.uname().release,
        "filesystem": _first_line("findmnt", "-n", "-o", "FSTYPE", "-T", str(where)),
        "disk (dd, 1 MiB, direct)": _dd(where, dd_mib),
        "QEMU": _first_line("qemu-system-x86_64", "--version"),
        "libvirt": _first_line("libvirtd", "--version"),
        "nbdcopy": _first_line("nbdcopy", "--version"),
        "drover": _first_line(str(drover), "--version"),
    }
