# SPDX-License-Identifier: Apache-2.0
"""Two (or more) virtualisation hosts on one machine, and guests that notice every lost write.

    with Lab() as lab:
        guest = lab.guest("web1", [Disk("4G", data="2G"), Disk("1G", "qcow2", data="256M")], rate=1000)
        lab.a.run(["drover", "move", "web1", "hostb"])
        assert guest.host is lab.b
        assert guest.command("full-verify")["ok"]
        assert lab.leftovers() == []

Lab       the hosts, the switch between them, what was created. Context manager; `close()` removes all
          of it, also after a failure, Ctrl-C or SIGTERM.
  a, b, lab["hosta"], hosts      the hosts
  guest(name, disks, ...)        make the images on a host, define the guest, start it, wait for it
  set_rate("1gbit" | None)       limit the links;      set_link(host, up)   pull a host's cable
  set_delay(20 | None)           milliseconds each way between two hosts
  events                         QEMU's events of all hosts; events.blackout(guest.name)
  leftovers()                    what a move left behind: a list of lines, empty when all is clean
  compare(host, path, host, path)  None if the images' contents are equal
  drop_caches()
Host      run(cmd) popen(cmd)    a command inside the host; the process object is the command itself
  virsh(...)  libvirt()  qmp(domain, command, ...)
  path("/x")                     where the machine sees the host's /x
  mount_fs("xfs", "1G", "/mnt/a")   a small filesystem of its own;   loop_disk("1G")   a block device
  mount_shared_fs(...)           the same, of all hosts
  power_cut("/mnt/a")            what was not synced there is gone;   new_boot_id()
  du(path)  restart_libvirtd()  machine_pid(4711)  ip  name  pid
Disk      one disk of a guest: size, format, data, cache ... (see the class)
Guest     status()               the witness's last report, wherever the guest runs
  command("full-verify")         and every other command of witness/witness.c; returns its answer
  verify()                       the same, as a call: {"ok": True, "mismatches": 0, ...}
  host  domain()  disks()  wait_report()  mismatches()  console()  destroy()

From the command line: `lab.py up` keeps a lab running until `lab.py down`; see `lab.py --help`.

A host is a network, mount, UTS, IPC and PID namespace over an overlay of the machine's own root, with a
real sshd and a real libvirtd. Its PID 1 is tini: when that dies, everything in it is gone. Nothing has
a name on the machine (no `ip netns`, no mounts outside), so labs do not collide and a lab that was
killed leaves only its directory and loop devices, which the next one removes.
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import fnmatch
import hashlib
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import FrameType
from typing import Any, Callable, Iterator, Optional, Sequence, Union
from xml.sax.saxutils import quoteattr

REPO = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("DROVER_LAB_CACHE", "/var/cache/drover-lab"))
WORK = Path(os.environ.get("DROVER_LAB_DIR", "/var/tmp/drover-lab"))

IMAGES = "/var/lib/libvirt/images"
JOBS = "/var/lib/drover"
HISTORY = f"{JOBS}/history.jsonl"  # is meant to stay
BOOT = "/var/lib/libvirt/boot"
TCG_FIX = "/usr/local/lib/qemu_tcg.so"
HOST_ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "LC_ALL": "C.UTF-8",
}
MODULES = ["virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_net"]

_libc = ctypes.CDLL(None, use_errno=True)
CLONE_NEWPID = 0x20000000
PR_SET_PDEATHSIG = 1


class LabError(Exception):
    """The lab itself could not do something; says what and why."""


# ------------------------------------------------------------------------------------- small tools


def parse_size(text: Union[str, int]) -> int:
    """"4G", "256M", "512" -> bytes."""
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"(\d+)([KMGT]?)", text.strip(), re.I)
    if not match:
        raise ValueError(f"not a size: {text!r}")
    return int(match[1]) << (10 * " KMGT".index(match[2].upper() or " "))


def _tool(cmd: Sequence[str], **kw: Any) -> subprocess.CompletedProcess[str]:
    """Runs a command on the machine; its error text becomes the exception's."""
    p = subprocess.run(cmd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, **kw)
    if p.returncode != 0:
        raise LabError(f"{' '.join(cmd)}: exit code {p.returncode}: {p.stderr.strip() or p.stdout.strip()}")
    return p


def _stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat after the command name: [0] is the state, [1] the parent, [19] the start time."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _start_time(pid: int) -> Optional[int]:
    """Identifies a process together with its id, which the kernel uses again. None: no such process."""
    try:
        fields = _stat_fields(pid)
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


def _alive(pid: int, start_time: int) -> bool:
    return _start_time(pid) == start_time


def _kill(pid: int, start_time: int) -> None:
    """Ends exactly that process and waits until it is gone."""
    if not _alive(pid, start_time):
        return
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if _alive(pid, start_time):
            signal.pidfd_send_signal(fd, signal.SIGKILL)
            select.select([fd], [], [], 30)
    finally:
        os.close(fd)


def _child_of(pid: int) -> Optional[int]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if int(_stat_fields(int(entry))[1]) == pid:
                    return int(entry)
    return None


def wait_for(what: str, condition: Callable[[], Any], timeout: float = 30, interval: float = 0.02) -> Any:
    """Polls until `condition()` is true and returns its value. For what has no event to wait for."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise LabError(f"timed out after {timeout:g} s waiting for {what}")
        time.sleep(interval)


def why_not() -> Optional[str]:
    """Why no lab can run on this machine; None if it can. Tests skip with this reason."""
    if os.geteuid() != 0:
        return "the lab needs root (namespaces, mounts)"
    path = HOST_ENV["PATH"]
    needed = ["unshare", "nsenter", "tini", "libvirtd", "virsh", "qemu-img", "qemu-system-x86_64", "sshd",
              "ssh-keygen", "ip", "tc", "losetup", "modinfo", "gcc"]
    missing = [p for p in needed if not shutil.which(p, path=path)]
    if missing:
        return f"missing programs: {' '.join(missing)} (run setup.sh)"
    if not (CACHE / "kernel/version").exists():
        return f"no guest kernel in {CACHE} (run setup.sh)"
    try:
        import libvirt  # noqa: F401
        import libvirt_qemu  # noqa: F401
    except ImportError as e:
        return f"{e} (use /usr/bin/python3 and run setup.sh)"
    WORK.mkdir(parents=True, exist_ok=True)
    probe = WORK / f".probe-{os.getpid()}"
    for d in ("upper", "work", "root"):
        (probe / d).mkdir(parents=True, exist_ok=True)
    script = (f"mount -t overlay overlay -o lowerdir=/,upperdir={probe}/upper,workdir={probe}/work {probe}/root"
              " && ip link add type bridge")
    p = subprocess.run(["unshare", "--fork", "--pid", "--net", "--mount", "--uts", "--ipc", "sh", "-c", script],
                       text=True, capture_output=True)
    shutil.rmtree(probe, ignore_errors=True)
    return f"namespaces, overlay or bridge do not work here: {p.stderr.strip()}" if p.returncode else None


# ------------------------------------------------------------------------ the guest's kernel and /init


def _cpio(files: dict[str, Union[bytes, None]]) -> bytes:
    """An initramfs (cpio "newc"). A value of None makes a directory."""
    out = bytearray()

    def add(name: str, mode: int, data: bytes, rdev: tuple[int, int] = (0, 0)) -> None:
        fields = [len(out) + 1, mode, 0, 0, 1, 0, len(data), 0, 0, *rdev, len(name) + 1, 0]
        out.extend(b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0")
        out.extend(b"\0" * (-len(out) % 4))
        out.extend(data)
        out.extend(b"\0" * (-len(out) % 4))

    for name, data in files.items():
        if data is None:
            add(name, stat.S_IFDIR | 0o755, b"")
        else:
            add(name, stat.S_IFREG | 0o755, data)
    add("dev/console", stat.S_IFCHR | 0o600, b"", (5, 1))
    add("TRAILER!!!", 0, b"")
    return bytes(out)


def _module_files() -> list[Path]:
    """The modules the guest needs, in the order to load them."""
    by_name = {p.name[: -len(".ko")].replace("-", "_"): p for p in (CACHE / "kernel/modules").rglob("*.ko")}
    order: list[Path] = []

    def add(name: str) -> None:
        file = by_name.get(name.replace("-", "_"))
        if file is None or file in order:  # None: built into the kernel
            return
        for dependency in _tool(["modinfo", "-F", "depends", str(file)]).stdout.strip().split(","):
            if dependency:
                add(dependency)
        order.append(file)

    for name in MODULES:
        add(name)
    return order


def _built(source: Path, *options: str) -> Path:
    """What gcc makes of a C file, made when it is not in the cache yet."""
    command = ["gcc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", *options]
    key = hashlib.sha256(source.read_bytes() + " ".join(command).encode()).hexdigest()[:16]
    built = CACHE / f"{source.stem}-{key}"
    if not built.exists():
        temporary = CACHE / f".build-{os.getpid()}-{threading.get_ident()}"
        try:
            _tool([*command, "-o", str(temporary), str(source)])
            temporary.rename(built)
        finally:
            temporary.unlink(missing_ok=True)
    return built


def build_delay() -> Path:
    """The program behind Lab.set_delay()."""
    return _built(REPO / "tests/lab/delay.c")


def build_tcg_fix() -> Path:
    """The library that keeps emulated guests' memory whole in a migration."""
    return _built(REPO / "tests/lab/qemu_tcg.c", "-shared", "-fPIC")


def build_witness() -> tuple[Path, Path, Path]:
    """(witness program, kernel, initramfs), built when they are not in the cache yet."""
    program = _built(REPO / "tests/lab/witness/witness.c", "-static", "-pthread")
    version = (CACHE / "kernel/version").read_text()
    key = hashlib.sha256(program.read_bytes() + version.encode() + " ".join(MODULES).encode()).hexdigest()[:16]
    initrd = CACHE / f"initrd-{key}"
    if not initrd.exists():
        modules = _module_files()
        files: dict[str, Optional[bytes]] = {d: None for d in ("dev", "proc", "sys", "modules")}
        files["init"] = program.read_bytes()
        files.update({f"modules/{m.name}": m.read_bytes() for m in modules})
        files["modules/order"] = "".join(m.name + "\n" for m in modules).encode()
        temporary = CACHE / f".build-{os.getpid()}-{threading.get_ident()}"
        try:
            temporary.write_bytes(_cpio(files))
            temporary.rename(initrd)
        finally:
            temporary.unlink(missing_ok=True)
    return program, CACHE / "kernel/vmlinuz", initrd


# ------------------------------------------------------------------------------------------- hosts

# Runs as the first process of a host's new namespaces; the host's PID 1 in the end.
_HOST_INIT = r"""
set -eu
base=$1 name=$2
shift 2
mount -t overlay overlay -o "lowerdir=/,upperdir=$base/upper,workdir=$base/work" "$base/root"
cd "$base/root"
mkdir -p proc sys dev run tmp old
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t tmpfs -o mode=755,size=1m tmpfs dev
mount -t tmpfs -o mode=755,size=256m tmpfs run
mount -t tmpfs -o mode=1777,size=256m tmpfs tmp
node() { mknod -m "$2" "dev/$1" c "$3" "$4"; }
node null 666 1 3; node zero 666 1 5; node full 666 1 7; node random 666 1 8; node urandom 666 1 9
node tty 666 5 0; node kmsg 600 1 11; node loop-control 660 10 237; node fuse 666 10 229
mkdir dev/net dev/pts dev/shm dev/mqueue dev/hugepages
node net/tun 666 10 200
# No /dev/kvm: nested virtualisation may be there and hang all the same; the lab's guests are emulated.
mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
ln -s /proc/self/fd/0 dev/stdin; ln -s /proc/self/fd/1 dev/stdout; ln -s /proc/self/fd/2 dev/stderr
mount -t tmpfs -o mode=1777 tmpfs dev/shm
bind() { mkdir -p ".$2"; mount --bind "$1" ".$2"; }
bind "$base/images" /var/lib/libvirt/images
bind "$base/jobs" /var/lib/drover
bind "$base/home" /root
while [ $# -gt 0 ]; do bind "$1" "$2"; shift 2; done
# What the machine's own libvirt may have: its guests and networks are none of ours.
rm -rf ./etc/libvirt/qemu/* ./etc/libvirt/storage ./var/lib/libvirt/qemu/* ./var/lib/libvirt/dnsmasq \
       ./var/log/libvirt/* ./etc/libvirt/secrets
mkdir -p ./var/log/libvirt/qemu
hostname "$name"
ip link set lo up
pivot_root . old
umount -l /old
rmdir /old
mount --make-rshared /   # as systemd does; libvirt gives each QEMU a mount namespace below this one
echo ready
exec tini -g -- sleep infinity </dev/null >/dev/null 2>&1
"""

# Debian's defaults but for what a host without systemd, AppArmor and cgroups cannot have.
_QEMU_CONF = """\
security_driver = "none"
cgroup_controllers = []
stdio_handler = "file"
"""

_LIBVIRTD_CONF = """\
host_uuid = "{uuid}"
auth_unix_ro = "none"
auth_unix_rw = "none"
"""

SSHD_LOG = Path("/var/log/sshd.log")
_SSHD_CONF = """\
HostKey /etc/ssh/ssh_host_ed25519_key
PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM yes
UseDNS no
PidFile /run/sshd.pid
Subsystem sftp internal-sftp
"""


@dataclasses.dataclass(frozen=True)
class _Mounted:
    """A filesystem of mount_fs()."""
    kind: str
    image: Path
    options: str


class Host:
    """One host of the lab. Made by Lab."""

    def __init__(self, lab: "Lab", name: str, ip: str) -> None:
        self.lab = lab
        self.name = name
        self.ip = ip
        self.dir = lab.dir / name
        self.pid = 0  # of the host's PID 1, as the machine sees it
        self.start_time = 0
        self.uuid = str(uuid.uuid4())
        self._connection: Any = None
        self._connection_lock = threading.Lock()
        self._watched = False  # its events are recorded
        self._clean: dict[str, Any] = {}
        self._filesystems: dict[str, _Mounted] = {}  # by where they are mounted

    def __repr__(self) -> str:
        return f"<Host {self.name}>"

    # Commands.

    def popen(self, cmd: Sequence[str], env: Optional[dict[str, str]] = None, cwd: str = "/root",
              **kw: Any) -> "subprocess.Popen[Any]":
        """Starts a command inside the host, as root. The object is the command's own process, not a
        helper's: its pid, signals and exit code are the command's."""
        # A process's PID namespace is that of its creation: this thread's next children are born into
        # the host's. nsenter then joins the other namespaces and becomes the command.
        # `env`: whoever started us in the background may have had SIGINT ignored, which is inherited.
        words = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", f"--wd={self.path(cwd)}", "--",
                 "env", "--default-signal=INT,QUIT,HUP,TERM", *map(str, cmd)]
        own = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        theirs = os.open(f"/proc/{self.pid}/ns/pid", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(theirs, CLONE_NEWPID) != 0:
                raise LabError(f"{self.name}: cannot enter its PID namespace: {os.strerror(ctypes.get_errno())}")
            try:
                return subprocess.Popen(words, env={**HOST_ENV, **(env or {})}, **kw)
            finally:
                _libc.setns(own, CLONE_NEWPID)
        finally:
            os.close(own)
            os.close(theirs)

    def run(self, cmd: Union[str, Sequence[str]], check: bool = True, input: Optional[str] = None,
            timeout: float = 600, env: Optional[dict[str, str]] = None,
            cwd: str = "/root") -> subprocess.CompletedProcess[str]:
        """Runs a command inside the host (a string: by the shell) and returns its result as text."""
        words = ["/bin/sh", "-c", cmd] if isinstance(cmd, str) else list(map(str, cmd))
        p = self.popen(words, env=env, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                       stdin=subprocess.DEVNULL if input is None else subprocess.PIPE)
        try:
            out, err = p.communicate(input, timeout=timeout)
        except BaseException:
            p.kill()
            p.communicate()
            raise
        if check and p.returncode != 0:
            raise LabError(f"{self.name}: {' '.join(words)}: exit code {p.returncode}: {err.strip() or out.strip()}")
        return subprocess.CompletedProcess(words, p.returncode, out, err)

    def virsh(self, *args: str, **kw: Any) -> str:
        """virsh inside the host; returns what it prints."""
        return self.run(["virsh", *args], **kw).stdout.strip()

    def libvirt(self) -> Any:
        """A libvirt connection (python3-libvirt's virConnect) to this host's libvirtd, made once."""
        with self._connection_lock:
            if self._connection is None or not self._connection.isAlive():
                _start_event_loop()
                import libvirt
                sock = self.path("/run/libvirt/libvirt-sock")
                self._connection = libvirt.open(f"qemu+unix:///system?socket={sock}")
                if self._watched:
                    self.lab.events._register(self, self._connection)
            return self._connection

    def _close_connection(self) -> None:
        with self._connection_lock:
            if self._connection is not None:
                with contextlib.suppress(Exception):
                    self._connection.close()
                self._connection = None

    def qmp(self, domain: str, command: str, **arguments: Any) -> Any:
        """A QMP command to a running guest's QEMU; returns its "return". `_` in names becomes `-`."""
        import libvirt_qemu
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        reply = json.loads(libvirt_qemu.qemuMonitorCommand(self.libvirt().lookupByName(domain), json.dumps(request), 0))
        if "error" in reply:
            raise LabError(f"{self.name}: {command}: {reply['error'].get('desc')}")
        return reply["return"]

    # Files.

    def path(self, inside: Union[str, Path]) -> Path:
        """Where the machine sees the host's file `inside`. (Absolute symbolic links are not followed as
        the host would.)"""
        return Path(f"/proc/{self.pid}/root{inside}")

    def du(self, path: str) -> int:
        """Bytes that a file takes on its filesystem."""
        return os.stat(self.path(path)).st_blocks * 512

    def mount_fs(self, kind: str, size: str, where: str, options: str = "") -> None:
        """Makes a filesystem (xfs, ext4, btrfs) of that size and mounts it at `where` in the host."""
        image = self.dir / f"fs-{secrets.token_hex(4)}.img"
        with open(image, "wb") as f:
            f.truncate(parse_size(size))
        _tool([f"mkfs.{kind}", "-q", str(image)])
        self.run(["mkdir", "-p", where])
        self._mount_image(_Mounted(kind, image, options), where)
        self.run(["chmod", "711", where])
        self._clean.setdefault("mounts", set()).add(where)

    def mount_shared_fs(self, kind: str, size: str, where: str) -> None:
        """The same, mounted in all of the lab's hosts: storage that they share. (They also share a kernel, so any
        filesystem does.)"""
        self.mount_fs(kind, size, where)
        fs = self._filesystems[where]
        device = next(d for d, image in _loops_below(self.lab.dir) if image == str(fs.image))
        for host in self.lab.hosts:
            if host is not self:
                host._device_node(device)
                host.run(["mkdir", "-p", where])
                host.run(["mount", "-t", fs.kind, *(["-o", fs.options] if fs.options else []), device, where])
                host._clean.setdefault("mounts", set()).add(where)
                host._filesystems[where] = fs

    def _mount_image(self, fs: "_Mounted", where: str) -> None:
        device = self._loop(fs.image)
        self.run(["mount", "-t", fs.kind, *(["-o", fs.options] if fs.options else []), device, where])
        _tool(["losetup", "-d", device])  # in use: the kernel detaches it with the last unmount
        self._filesystems[where] = fs

    def umount(self, where: str) -> None:
        self.run(["umount", where])
        self._clean.get("mounts", set()).discard(where)
        self._filesystems.pop(where, None)

    def power_cut(self, where: str) -> None:
        """What a power cut does to a filesystem of mount_fs(): what was not synced is lost, and its
        journal is replayed. Nobody may have a file open in it any more."""
        fs_ioc_shutdown = 0x8004587D  # _IOR('X', 125, __u32): ext4 and XFS
        folder = os.open(self.path(where), os.O_RDONLY)
        try:
            fcntl.ioctl(folder, fs_ioc_shutdown, struct.pack("I", 2))  # 2: not even the journal's end is written
        finally:
            os.close(folder)
        fs = self._filesystems[where]
        # The kernel lets go of a killed process's io_uring, and the files in it, after the process has gone.
        wait_for(f"{where} to be free", lambda: self.run(["umount", where], check=False).returncode == 0)
        self._mount_image(fs, where)

    BOOT_ID = "/proc/sys/kernel/random/boot_id"

    def new_boot_id(self) -> None:
        """What runs in the host from now on believes that the host was restarted."""
        self.path("/run/boot_id").write_text(f"{uuid.uuid4()}\n")
        self.run(["mount", "--bind", "/run/boot_id", self.BOOT_ID])
        self._clean["mounts"].add(self.BOOT_ID)

    def old_boot_id(self) -> None:
        self.umount(self.BOOT_ID)

    def loop_disk(self, size: Union[str, int]) -> str:
        """A block device of that size; returns its path, the same inside the host and outside."""
        image = self.dir / f"loop-{secrets.token_hex(4)}.img"
        with open(image, "wb") as f:
            f.truncate(parse_size(size))
        device = self._loop(image)
        self.lab.loops[device] = str(image)
        self.lab._save()
        return device

    def _loop(self, image: Path) -> str:
        device = _tool(["losetup", "--find", "--show", "--direct-io=on", str(image)]).stdout.strip()
        self._device_node(device)
        return device

    def _device_node(self, device: str) -> None:
        self.run(["sh", "-c", f"[ -b {device} ] || mknod -m 660 {device} b $1 $2 && chgrp disk {device}", "sh",
                  str(os.major(os.stat(device).st_rdev)), str(os.minor(os.stat(device).st_rdev))])

    # Life.

    def _prepare(self, hosts: dict[str, str], key: Path) -> None:
        """Writes the host's own files into its overlay."""
        for d in ("work", "root", "images", "jobs", "home/.ssh", "upper/etc/ssh", "upper/etc/libvirt",
                  "upper/usr/local/bin", "upper/var/lib/libvirt"):
            (self.dir / d).mkdir(parents=True)
        # A directory in the upper layer replaces the lower one's mode and owner.
        (self.dir / "images").chmod(0o711)
        (self.dir / "home").chmod(0o700)
        (self.dir / "home/.ssh").chmod(0o700)
        upper = self.dir / "upper"

        def write(name: str, text: str, mode: int = 0o644) -> None:
            file = upper / name
            file.write_text(text)
            file.chmod(mode)

        lines = "".join(f"{ip}\t{name}\n" for name, ip in hosts.items())
        write("etc/hosts", f"127.0.0.1\tlocalhost\n{lines}")
        write("etc/resolv.conf", "")
        write("etc/hostname", self.name + "\n")
        write("etc/libvirt/qemu.conf", _QEMU_CONF, 0o600)
        write("etc/libvirt/libvirtd.conf", _LIBVIRTD_CONF.format(uuid=self.uuid))
        write("etc/libvirt/libvirt.conf", "")
        write("etc/ssh/sshd_config", _SSHD_CONF)
        host_key = upper / "etc/ssh/ssh_host_ed25519_key"
        _tool(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", self.name, "-f", str(host_key)])
        ssh = self.dir / "home/.ssh"
        public = Path(f"{key}.pub")
        for file, name in ((key, "id_ed25519"), (public, "id_ed25519.pub"), (public, "authorized_keys")):
            shutil.copy(file, ssh / name)
            (ssh / name).chmod(0o600)
        # /usr/local/bin/drover is a link, so that a rebuilt program is the one that runs next.
        (upper / "usr/local/bin/drover").symlink_to(self.lab.drover_inside)

    def _boot(self) -> None:
        binds = [str(REPO), str(REPO)]
        if self.lab.drover != self.lab.drover_inside:
            binds += [str(self.lab.drover.parent), str(self.lab.drover_inside.parent)]
        cmd = ["unshare", "--fork", "--kill-child=KILL", "--pid", "--net", "--mount", "--uts", "--ipc",
               "--propagation", "private", "--", "/bin/sh", str(self.dir / "init.sh"), str(self.dir), self.name, *binds]
        (self.dir / "init.sh").write_text(_HOST_INIT)
        with open(self.dir / "boot.log", "wb") as log:
            p = self.lab._spawn(cmd, stdout=subprocess.PIPE, stderr=log, env=HOST_ENV)
        assert p.stdout
        if p.stdout.readline() != b"ready\n":
            p.wait()
            raise LabError(f"{self.name} did not start: {(self.dir / 'boot.log').read_text().strip()}")
        p.stdout.close()
        pid = _child_of(p.pid)
        if pid is None:
            raise LabError(f"{self.name} died at once")
        self.pid, self.start_time = pid, _start_time(pid) or 0

    def _start_services(self) -> None:
        self.run(["mkdir", "-p", BOOT, "/run/sshd"])
        self._install()
        known = "".join(f"{h.name},{h.ip} {(h.dir / 'upper/etc/ssh/ssh_host_ed25519_key.pub').read_text()}"
                        for h in self.lab.hosts)
        self.path("/etc/ssh/ssh_known_hosts").write_text(known)
        self.run(["/usr/sbin/sshd", "-E", str(SSHD_LOG)])
        self.start_libvirtd()

    def _install(self) -> None:
        """Copies the guest's kernel and initramfs, and what QEMU needs, into the host, unless these are there already
        (a lab that keeps running should use a witness that was changed meanwhile)."""
        program, kernel, initrd = build_witness()
        for source, inside in ((program, "/usr/local/bin/witness"), (kernel, f"{BOOT}/vmlinuz"),
                               (initrd, f"{BOOT}/initrd"), (build_tcg_fix(), TCG_FIX)):
            target = self.path(inside)
            if not target.exists() or target.stat().st_mtime_ns != source.stat().st_mtime_ns:
                new = target.with_name(target.name + ".new")
                shutil.copy2(source, new)
                new.rename(target)

    def start_libvirtd(self) -> None:
        """libvirtd in the background; returns when it answers."""
        self.run(["libvirtd", "-d", "--pid-file", "/run/libvirtd.pid"], env={"LD_PRELOAD": TCG_FIX})  # its QEMUs get it
        wait_for(f"{self.name}'s libvirtd", lambda: self.run(["virsh", "version"], check=False).returncode == 0)
        if self._watched:
            self.libvirt()  # a new connection, so that no event is missed

    def stop_libvirtd(self, sig: int = signal.SIGTERM) -> None:
        """Ends libvirtd (its guests run on, as in life) and waits until it is gone."""
        inside = self.path("/run/libvirtd.pid").read_text().strip()
        self._close_connection()
        self.run(["kill", f"-{int(sig)}", inside])
        wait_for(f"{self.name}'s libvirtd to end", lambda: not self.path(f"/proc/{inside}").exists())

    def restart_libvirtd(self) -> None:
        self.stop_libvirtd()
        self.start_libvirtd()

    def processes(self) -> dict[int, str]:
        """All processes of the host: the machine's process id -> command line."""
        mine = os.stat(f"/proc/{self.pid}/ns/pid").st_ino
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}/ns/pid").st_ino != mine:
                    continue
                line = Path(f"/proc/{entry}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found[int(entry)] = line or f"[{Path(f'/proc/{entry}/comm').read_text().strip()}]"
        return found

    def machine_pid(self, inside: int) -> int:
        """The machine's id of the process that the host knows by this one."""
        for pid in self.processes():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                    if line.startswith("NSpid:") and int(line.split()[-1]) == inside:
                        return pid
        raise LabError(f"{self.name}: there is no process {inside}")

    def _mounts(self) -> set[str]:
        return {line.split()[4] for line in self.path("/proc/1/mountinfo").read_text().splitlines()}

    def _listening(self) -> set[str]:
        """TCP ports and unix sockets (by path) on which something in the host listens."""
        found = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/{self.pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A":
                    found.add(f"tcp port {int(fields[1].rpartition(':')[2], 16)}")
        for line in Path(f"/proc/{self.pid}/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            if len(fields) > 7 and int(fields[3], 16) & 0x10000:  # __SO_ACCEPTCON
                found.add(f"unix socket {fields[7]}")
        return found

    def _remember_clean(self) -> None:
        self._clean.update(mounts=self._mounts(), listening=self._listening(), processes=set(self.processes()))

    def wait_freed(self) -> None:
        """Until nothing frees a deleted disk's blocks any more: drover leaves that to a process of its own."""
        wait_for(f"the freeing of deleted files on {self.name}",
                 lambda: not any(" free-blocks " in line for line in self.processes().values()), timeout=120)

    def leftovers(self) -> list[str]:
        """What is in the host now that was not there after it booted, apart from running guests, their
        disks and what the lab itself added."""
        import libvirt
        found: list[str] = []
        disks: set[str] = set()
        running: list[str] = []
        for domain in self.libvirt().listAllDomains():
            xml = domain.XMLDesc()
            disks.update(re.findall(r"<source (?:file|dev)='([^']+)'", xml))
            if not domain.isActive():
                found.append(f"domain: {domain.name()} is defined and not running")
                continue
            running.append(domain.name())
            if domain.state()[0] != libvirt.VIR_DOMAIN_RUNNING:
                found.append(f"domain: {domain.name()} is not running but in state {domain.state()[0]}")
            found.extend(self._guest_leftovers(domain.name()))
        for pid, line in self.processes().items():
            if pid in self._clean["processes"] or any(f"guest={name}," in line for name in running):
                continue
            if line.startswith("/usr/sbin/libvirtd ") or line.startswith("libvirtd "):
                continue  # restarted
            found.append(f"process: {line[:200]}")
        for top in (IMAGES, JOBS, "/tmp", "/run/drover", *(m for m in self._clean["mounts"] if m.startswith("/mnt"))):
            for folder, folders, names in os.walk(self.path(top)):
                # What is mounted below (the repository may lie in /tmp) is not the host's own. (ismount()
                # would follow /proc/PID/root and look at the machine's own directories.)
                device = os.lstat(folder).st_dev
                folders[:] = [f for f in folders if os.lstat(os.path.join(folder, f)).st_dev == device]
                for name in names:
                    inside = os.path.join(folder, name)[len(str(self.path(""))):]
                    if inside not in disks and inside != HISTORY:
                        found.append(f"file: {inside}")
        found.extend(f"mount: {m}" for m in sorted(self._mounts() - self._clean["mounts"]))
        own = re.compile(r"/var/lib/libvirt/qemu/(domain-\d+-|lab-)|/run/libvirt/")
        found.extend(f"listening: {s}" for s in sorted(self._listening() - self._clean["listening"])
                     if not own.search(s) or "drover" in s)
        found.extend(f"file: /run/{p.name}" for p in self.path("/run").glob("drover-*"))
        for folder in ("/var/lib/libvirt/qemu", "/run/libvirt/qemu"):
            found.extend(f"file: {folder}/{p.relative_to(self.path(folder))}" for p in self.path(folder).rglob("*drover*"))
        return found

    def _guest_leftovers(self, name: str) -> list[str]:
        found = []
        for node in self.qmp(name, "query-named-block-nodes"):
            if node["node-name"].startswith("drover-"):
                found.append(f"node: {name}: {node['node-name']}")
            found.extend(f"bitmap: {name}: {b.get('name')} on {node['node-name']}" for b in node.get("dirty-bitmaps", [])
                         if b.get("name", "").startswith("drover-"))
        found.extend(f"job: {name}: {j['id']} ({j['type']}, {j['status']})" for j in self.qmp(name, "query-jobs"))
        found.extend(f"export: {name}: {e['id']}" for e in self.qmp(name, "query-block-exports"))
        found.extend(f"object: {name}: {o['name']}" for o in self.qmp(name, "qom-list", path="/objects")
                     if o["name"].startswith("drover-"))
        # QEMU has no command that tells whether its NBD server runs: start one and see.
        probe = f"/var/lib/libvirt/qemu/lab-probe-{secrets.token_hex(3)}.sock"
        try:
            self.qmp(name, "nbd-server-start", addr={"type": "unix", "data": {"path": probe}})
            self.qmp(name, "nbd-server-stop")
        except LabError as e:
            found.append(f"nbd server: {name}: {e}")
        self.path(probe).unlink(missing_ok=True)
        return found


# ------------------------------------------------------------------------------------------ events

_event_loop_started = False


def _start_event_loop() -> None:
    """libvirt's event loop in a thread of its own; must exist before the first connection is made."""
    global _event_loop_started
    if _event_loop_started:
        return
    _event_loop_started = True
    import libvirt
    libvirt.registerErrorHandler(lambda _ctx, _err: None, None)  # errors arrive as exceptions
    libvirt.virEventRegisterDefaultImpl()

    def loop() -> None:
        while True:
            libvirt.virEventRunDefaultImpl()

    threading.Thread(target=loop, name="libvirt-events", daemon=True).start()


@dataclasses.dataclass(frozen=True)
class Event:
    time: float  # QEMU's own time stamp; one clock for all hosts of the lab
    host: str
    domain: str
    name: str  # as in QMP: STOP, RESUME, MIGRATION, BLOCK_JOB_READY, ...
    data: dict[str, Any]


class Events:
    """QEMU's events of all hosts from the lab's start on."""

    def __init__(self) -> None:
        self.all: list[Event] = []
        self._changed = threading.Condition()

    def _watch(self, host: Host) -> None:
        if not host._watched:
            connection = host.libvirt()
            host._watched = True
            self._register(host, connection)

    def _register(self, host: Host, connection: Any) -> None:
        import libvirt_qemu

        def arrived(_conn: Any, dom: Any, name: str, seconds: int, micros: int, details: str, _opaque: Any) -> None:
            event = Event(seconds + micros / 1e6, host.name, dom.name(), name, json.loads(details) if details else {})
            with self._changed:
                self.all.append(event)
                self._changed.notify_all()

        libvirt_qemu.qemuMonitorEventRegister(connection, None, None, arrived, None)

    def mark(self) -> int:
        """A position: pass it to wait() or since() to see only what comes after."""
        with self._changed:
            return len(self.all)

    def since(self, mark: int = 0) -> list[Event]:
        with self._changed:
            return self.all[mark:]

    def wait(self, name: str, domain: Optional[str] = None, host: Optional[Host] = None, mark: int = 0,
             timeout: float = 60) -> Event:
        """The first such event after `mark`; waits for it if it has not come yet."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while True:
                for e in self.all[mark:]:
                    if e.name == name and domain in (None, e.domain) and (host is None or host.name == e.host):
                        return e
                left = deadline - time.monotonic()
                if left <= 0 or not self._changed.wait(left):
                    raise LabError(f"no event {name} within {timeout:g} s")

    def blackout(self, domain: str, mark: int = 0) -> Optional[float]:
        """Seconds in which the guest ran nowhere in its last move: STOP on one host to RESUME on
        another. None: it has not moved since `mark`."""
        stop: Optional[Event] = None
        result: Optional[float] = None
        for e in sorted((e for e in self.since(mark) if e.domain == domain), key=lambda e: e.time):
            if e.name == "STOP" and (stop is None or stop.host == e.host):
                stop = e
            elif e.name == "RESUME" and stop is not None:
                if e.host != stop.host:
                    result = e.time - stop.time
                stop = None
        return result


# ------------------------------------------------------------------------------------------ guests


@dataclasses.dataclass
class Disk:
    """One disk of a guest.

    data: how much of it holds witness records from the start: "2G", or "0:1G,2G:512M" for several
    places. They cannot be compressed unless `entropy` is below 100 (percent of each block that is noise).
    image: a raw file of the machine's, of which the disk is a copy (then size and data are not looked at).
    path: the image, or a block device made with Host.loop_disk() (then size is the device's); default
    IMAGES/GUEST-TARGET.FORMAT. `driver` and `xml` go into the <driver> and <disk> elements as they are,
    e.g. driver={"iothread": "1"}, xml="<iotune><total_bytes_sec>10000000</total_bytes_sec></iotune>".
    """
    size: Union[str, int] = "1G"
    format: str = "raw"
    data: str = ""
    image: Optional[Path] = None
    path: Optional[str] = None
    bus: str = "virtio"  # or "scsi"
    cache: str = "none"
    io: Optional[str] = None
    discard: str = "unmap"
    driver: dict[str, str] = dataclasses.field(default_factory=dict)
    xml: str = ""
    target: str = ""  # vda, vdb, ... / sda, ...; set by Lab.guest() when empty

    def _create(self, host: Host, guest: str, entropy: int, unit: int) -> None:
        self.path = self.path or f"{IMAGES}/{guest}-{self.target}.{self.format}"
        block = self.path.startswith("/dev/")
        fill = ["witness", "--fill", "", self.target, str(unit), str(entropy), self.data]
        if self.image:
            _tool(["qemu-img", "convert", "-q", "-f", "raw", "-O", self.format, str(self.image),
                   str(host.path(self.path))])
            return
        if self.format == "raw":
            if not block:
                host.run(["qemu-img", "create", "-q", "-f", "raw", self.path, str(parse_size(self.size))])
            if self.data:
                fill[2] = self.path
                host.run(fill)
            return
        if not self.data:
            host.run(["qemu-img", "create", "-q", "-f", self.format, self.path, str(parse_size(self.size))])
            return
        fill[2] = raw = f"{self.path}.making"
        host.run(["truncate", "-s", str(parse_size(self.size)), raw])
        host.run(fill)
        host.run(["qemu-img", "convert", "-q", "-f", "raw", "-O", self.format, raw, self.path])
        host.run(["rm", raw])

    def _xml(self) -> str:
        block = str(self.path).startswith("/dev/")
        driver = {"name": "qemu", "type": self.format, "cache": self.cache, "discard": self.discard}
        if self.io:
            driver["io"] = self.io
        driver.update(self.driver)
        attributes = " ".join(f"{k}={quoteattr(v)}" for k, v in driver.items())
        return (f"<disk type='{'block' if block else 'file'}' device='disk'><driver {attributes}/>"
                f"<source {'dev' if block else 'file'}={quoteattr(str(self.path))}/>"
                f"<target dev='{self.target}' bus='{self.bus}'/>{self.xml}</disk>")


class Guest:
    """A guest that runs the witness. Made by Lab.guest(), or Guest(lab, name) for one that exists."""

    def __init__(self, lab: "Lab", name: str) -> None:
        self.lab = lab
        self.name = name

    def __repr__(self) -> str:
        return f"<Guest {self.name}>"

    # Where it is.

    @property
    def host(self) -> Host:
        """The host on which the guest runs now (paused or not)."""
        # It may move between the looks at two hosts: then the second time tells.
        for _ in range(2):
            states = {host: self._state_on(host) for host in self.lab.hosts}
            running = [host for host, state in states.items() if state == "running"]
            there = running or [host for host, state in states.items() if state]
            if there and len(running) < 2:
                return there[0]
        raise LabError(f"{self.name} runs on {' and '.join(h.name for h in running) or 'no host'}")

    def _state_on(self, host: Host) -> str:
        """"running", "paused", or nothing if it does not run there at all."""
        import libvirt
        try:
            domain = host.libvirt().lookupByName(self.name)
            if not domain.isActive():
                return ""
            return "running" if domain.state()[0] == libvirt.VIR_DOMAIN_RUNNING else "paused"
        except libvirt.libvirtError:
            return ""

    def domain(self) -> Any:
        """The libvirt domain (virDomain) on the host where the guest runs."""
        return self.host.libvirt().lookupByName(self.name)

    def qemu_pid(self, host: Optional[Host] = None) -> int:
        """Its QEMU's process, of this machine's ids (default: where it runs)."""
        host = host or self.host
        return host.machine_pid(int(host.path(f"/run/libvirt/qemu/{self.name}.pid").read_text()))

    def disks(self, host: Optional[Host] = None) -> dict[str, str]:
        """Target -> path of its disks, as libvirt has them now."""
        xml = (host or self.host).libvirt().lookupByName(self.name).XMLDesc()
        found = {}
        for disk in re.findall(r"<disk .*?</disk>", xml, re.S):
            source = re.search(r"<source (?:file|dev)='([^']+)'", disk)
            target = re.search(r"<target dev='([^']+)'", disk)
            if source and target:
                found[target[1]] = source[1]
        return found

    # The witness. It writes to one serial port, a file, and reads commands from another, a socket. QEMU
    # opens both anew on the target, so the file of the host where the guest runs is the one that grows.

    def _log(self, host: Host) -> Path:
        return host.path(f"/var/log/libvirt/qemu/lab-{self.name}.log")

    def _printed(self, tail: int = 65536) -> Iterator[bytes]:
        """The end of what the guest printed, of each host."""
        for host in self.lab.hosts:
            with contextlib.suppress(OSError), open(self._log(host), "rb") as f:
                size = f.seek(0, os.SEEK_END)
                f.seek(max(0, size - tail))
                yield f.read()

    def _lines(self, tail: int = 65536) -> Iterator[dict[str, Any]]:
        """What the witness said lately, on any host."""
        for text in self._printed(tail):
            for line in text.splitlines():
                # The rest of a line that a move cut short is in the other host's file. What the guest prints when it
                # is back follows the beginning, in the same line.
                at = line.rfind(b"WITNESS {")
                if at >= 0:
                    with contextlib.suppress(ValueError):
                        yield json.loads(line[at + 8:])

    def _crash(self) -> Optional[str]:
        """What the guest's kernel said when it crashed, if it did: it answers nothing any more."""
        for text in self._printed():
            found = re.search(rb"(BUG: |Oops: |Kernel panic).*", text)
            if found:
                return found[0].decode(errors="replace").strip()
        return None

    def console(self) -> str:
        """All that the guest printed on all hosts; for a test's failure message."""
        return "".join(f"--- {h.name}\n{self._log(h).read_text(errors='replace')}\n" for h in self.lab.hosts
                       if self._log(h).exists())

    def status(self) -> dict[str, Any]:
        """The witness's last report. Its number "n" only grows, wherever the guest runs."""
        reports = [r for r in self._lines() if r.get("type") in ("report", "status")]
        if not reports:
            return self.command("status")  # none yet, or none wanted (w.report=0)
        return max(reports, key=lambda r: r["n"])

    def wait_report(self, after: Optional[int] = None, timeout: float = 60) -> dict[str, Any]:
        """The first report with a number greater than `after` (default: than the last one's now)."""
        if after is None:
            after = self.status()["n"]

        def newer() -> Optional[dict[str, Any]]:
            reports = [r for r in self._lines() if r.get("type") in ("report", "status") and r["n"] > after]
            return min(reports, key=lambda r: r["n"]) if reports else None

        return wait_for(f"{self.name}'s next report", newer, timeout)

    def wait_ready(self, timeout: float = 60) -> None:
        def ready() -> bool:
            for line in self._lines(1 << 30):
                if line.get("type") == "fatal":
                    raise LabError(f"{self.name}: {line['text']}")
                if line.get("type") == "ready":
                    return True
            self.host  # raises if it died
            return False
        try:
            wait_for(f"{self.name} to boot", ready, timeout)
        except LabError as e:
            raise LabError(f"{e}; console: {self.console()[-3000:]}") from None

    def mismatches(self) -> list[dict[str, Any]]:
        """The first wrong blocks that the witness saw: disk, offset, expected and found record."""
        return [r for r in self._lines(1 << 30) if r.get("type") == "mismatch"]

    def command(self, text: str, timeout: float = 300) -> dict[str, Any]:
        """Sends the witness a command and returns its answer, wherever the guest is by then."""
        deadline = time.monotonic() + timeout
        sent: list[int] = []
        link: Optional[socket.socket] = None
        try:
            while time.monotonic() < deadline:
                if link is None:
                    # The first time; and again if the guest moved away, for then what was on its way
                    # into the serial port may be lost. (An empty line ends what may have arrived of it.)
                    link = self._connect()
                    if link is not None:
                        sent.append(int.from_bytes(secrets.token_bytes(3), "big") + 1)
                        link.sendall(f"\n{sent[-1]} {text}\n".encode())
                # Nothing is ever said on this port: readable means that QEMU is gone.
                if link is None:
                    time.sleep(0.02)
                elif select.select([link], [], [], 0.02)[0]:
                    link.close()
                    link = None
                for line in self._lines():
                    if line.get("id") in sent and (line["type"] != "error" or line["id"] == sent[-1]):
                        if line["type"] == "error":
                            raise LabError(f"{self.name}: {text}: {line['text']}")
                        return line
                if crash := self._crash():
                    raise LabError(f"{self.name}: {text}: the guest's kernel has crashed: {crash}")
        finally:
            if link is not None:
                link.close()
        raise LabError(f"{self.name}: no answer to {text!r} within {timeout:g} s")

    def _connect(self) -> Optional[socket.socket]:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(str(self.host.path(f"/var/lib/libvirt/qemu/lab-{self.name}.sock")))
            return link
        except (OSError, LabError):  # between two hosts
            link.close()
            return None

    def verify(self, timeout: float = 600) -> dict[str, Any]:
        """full-verify: reads back all that the disks must hold. {"ok": True, "mismatches": 0, ...}"""
        return self.command("full-verify", timeout)

    def destroy(self, remove_disks: bool = True) -> None:
        """Ends the guest on all hosts, undefines it and removes its disk files."""
        import libvirt
        for host in self.lab.hosts:
            with contextlib.suppress(libvirt.libvirtError):
                domain = host.libvirt().lookupByName(self.name)
                disks = self.disks(host)
                if domain.isActive():
                    domain.destroy()
                with contextlib.suppress(libvirt.libvirtError):
                    domain.undefineFlags(libvirt.VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
                                         | libvirt.VIR_DOMAIN_UNDEFINE_SNAPSHOTS_METADATA
                                         | libvirt.VIR_DOMAIN_UNDEFINE_CHECKPOINTS_METADATA)
                for path in disks.values():
                    if remove_disks and not path.startswith("/dev/"):
                        host.path(path).unlink(missing_ok=True)
            self._log(host).unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------- lab


class Lab:
    """Hosts, and the switch between them. `up()` and `close()`, or a `with` statement.

    drover: the program that the hosts find as `drover` (default: $DROVER, else build/drover of this
    repository; it need not exist yet). persist: the hosts outlive this process (for `lab.py up`).
    """

    def __init__(self, hosts: Sequence[str] = ("hosta", "hostb"), name: Optional[str] = None,
                 drover: Union[str, Path, None] = None, persist: bool = False) -> None:
        self.name = name or f"lab-{os.getpid()}-{secrets.token_hex(2)}"
        if not re.fullmatch(r"[A-Za-z0-9._-]+", self.name):
            raise LabError(f"a lab cannot be called {self.name!r}")
        self.dir = WORK / self.name
        self.drover = Path(drover or os.environ.get("DROVER") or REPO / "build/drover").absolute()
        self.persist = persist
        self.switch = 0
        self._switch_start = 0
        self.loops: dict[str, str] = {}
        self.hosts = [Host(self, h, f"10.99.0.{i + 1}") for i, h in enumerate(hosts)]
        self.events = Events()
        self._children: list[subprocess.Popen[Any]] = []
        self._delay: Optional[subprocess.Popen[Any]] = None
        self._old_sigterm: Any = None
        self._attached = False

    def __getitem__(self, name: str) -> Host:
        return next(h for h in self.hosts if h.name == name)

    @property
    def a(self) -> Host:
        return self.hosts[0]

    @property
    def b(self) -> Host:
        return self.hosts[1]

    @property
    def drover_inside(self) -> Path:
        """Where the hosts have the program under test: in the repository, which they see at its own
        path, or in a folder that is mounted for it."""
        return self.drover if REPO in self.drover.parents else Path("/opt/drover-under-test") / self.drover.name

    def other(self, host: Host) -> Host:
        """The other one of two hosts."""
        return self.b if host is self.a else self.a

    # Life.

    def __enter__(self) -> "Lab":
        if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            def terminated(_sig: int, _frame: Optional[FrameType]) -> None:
                raise SystemExit(143)  # runs __exit__, as KeyboardInterrupt does
            self._old_sigterm = signal.signal(signal.SIGTERM, terminated)
        return self.up()

    def __exit__(self, *_: object) -> None:
        try:
            self.close()
        finally:
            if self._old_sigterm is not None:
                signal.signal(signal.SIGTERM, self._old_sigterm)

    def up(self) -> "Lab":
        """Starts all hosts. On any failure nothing is left."""
        reason = why_not()
        if reason:
            raise LabError(reason)
        build_witness()
        build_tcg_fix()
        Lab.collect_garbage()
        try:
            self.dir.mkdir(parents=True)
        except FileExistsError:
            raise LabError(f"a lab {self.name} exists already") from None
        try:
            self._save()
            self._up()
        except BaseException:
            self.close()
            raise
        return self

    def _up(self) -> None:
        switch = self._spawn(["unshare", "--net", "--", "sleep", "infinity"], env=HOST_ENV, stdin=subprocess.DEVNULL,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.switch = switch.pid
        own = os.stat("/proc/self/ns/net").st_ino
        wait_for("the switch", lambda: os.stat(f"/proc/{self.switch}/ns/net").st_ino != own)
        self._switch_start = _start_time(self.switch) or 0
        self._in_switch("ip", "link", "add", "br0", "type", "bridge")
        self._in_switch("ip", "link", "set", "br0", "up")
        key = self.dir / "key"
        _tool(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab", "-f", str(key)])
        addresses = {h.name: h.ip for h in self.hosts}
        for host in self.hosts:
            host._prepare(addresses, key)
            host._boot()
            self._save()
            # eth0 is the host's own; eth1 goes into the bridge br0, for guests with a network card.
            for port, inside in ((host.name, "eth0"), (f"{host.name}-g", "eth1")):
                self._in_switch("ip", "link", "add", port, "type", "veth", "peer", "name", inside, "netns", str(host.pid))
                self._in_switch("ip", "link", "set", port, "master", "br0", "up")
            # br0 must not answer for eth0's address: the host's traffic would come in by eth1, past set_rate() and
            # set_link().
            host.run("echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore && echo 2 >/proc/sys/net/ipv4/conf/all/arp_announce")
            host.run(f"ip addr add {host.ip}/16 dev eth0 && ip link set eth0 up && ip link add br0 type bridge &&"
                     " ip link set eth1 master br0 up && ip link set br0 up")
        threads = [_Task(host._start_services) for host in self.hosts]
        for t in threads:
            t.result()
        for host in self.hosts:
            host._remember_clean()
            self.events._watch(host)
        self._save()

    def close(self) -> None:
        """Ends everything that the lab started and removes all that it made."""
        for host in self.hosts:
            host._close_connection()
        for host in self.hosts:
            if host.pid:
                _kill(host.pid, host.start_time)  # PID 1: all of the host goes with it
        if self.switch:
            _kill(self.switch, self._switch_start)
        if self._delay is not None:
            self._delay.kill()
        for child in self._children:
            if child.poll() is None:
                # unshare ends by itself after the host's PID 1; only one that never got so far is left.
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(2)
                if child.poll() is None:
                    child.kill()
            child.wait()
        self._children.clear()
        _remove_lab_dir(self.dir)

    @classmethod
    def attach(cls, name: str) -> "Lab":
        """A lab that another process keeps running (`lab.py up`). Leaving it does not end it."""
        try:
            state = json.loads((WORK / name / "state.json").read_text())
        except OSError:
            raise LabError(f"there is no lab {name}") from None
        lab = cls([h["name"] for h in state["hosts"]], name, state["drover"], persist=True)
        lab._attached = True
        lab.switch, lab._switch_start, lab.loops = state["switch"], state["switch_start"], state["loops"]
        for host, saved in zip(lab.hosts, state["hosts"]):
            host.pid, host.start_time, host.uuid = saved["pid"], saved["start_time"], saved["uuid"]
            host._clean = {k: set(v) for k, v in saved["clean"].items()}
            if not _alive(host.pid, host.start_time):
                raise LabError(f"lab {name}: {host.name} is not running any more")
        return lab

    def watch_events(self) -> None:
        """Starts recording events (a lab that was attached to does not do so by itself)."""
        for host in self.hosts:
            self.events._watch(host)

    def _save(self) -> None:
        """What others need to find this lab, and to remove it if this process is killed."""
        state = {
            "name": self.name,
            "drover": str(self.drover),
            "owner": None if self.persist else [os.getpid(), _start_time(os.getpid())],
            "switch": self.switch,
            "switch_start": self._switch_start,
            "loops": self.loops,
            "hosts": [{"name": h.name, "ip": h.ip, "pid": h.pid, "start_time": h.start_time, "uuid": h.uuid,
                       "clean": {k: sorted(v) for k, v in h._clean.items()}} for h in self.hosts],
        }
        new = self.dir / "state.json.new"
        new.write_text(json.dumps(state, indent=1))
        new.rename(self.dir / "state.json")

    def _spawn(self, cmd: Sequence[str], **kw: Any) -> "subprocess.Popen[Any]":
        """Starts a process of the lab. It dies with this one, however that ends, unless `persist`."""
        if not self.persist:
            # (--pdeathsig counts from the thread that forks; labs are started from the main one.)
            cmd = ["setpriv", "--pdeathsig", "KILL", "--", *cmd]
        child = subprocess.Popen(cmd, start_new_session=True, **kw)
        self._children.append(child)
        return child

    @staticmethod
    def collect_garbage() -> list[str]:
        """Removes what labs left whose process was killed before it could clean up."""
        removed = []
        for probe in WORK.glob(".probe-*"):
            if _start_time(int(probe.name.rpartition("-")[2])) is None:
                shutil.rmtree(probe, ignore_errors=True)
        for file in WORK.glob("*/state.json"):
            try:
                state = json.loads(file.read_text())
            except (OSError, ValueError):
                continue
            owner = state["owner"]
            if owner is not None and _alive(*owner):
                continue
            if owner is None and any(_alive(h["pid"], h["start_time"]) for h in state["hosts"]):
                continue
            if owner is None and time.time() - file.stat().st_mtime < 60:
                continue  # being started
            for h in state["hosts"]:
                if h["pid"]:
                    _kill(h["pid"], h["start_time"])
            if state["switch"]:
                _kill(state["switch"], state["switch_start"])
            _remove_lab_dir(file.parent)
            removed.append(state["name"])
        return removed

    # The network.

    def _in_switch(self, *cmd: str) -> None:
        _tool(["nsenter", "-t", str(self.switch), "-n", "--", *cmd])

    def set_rate(self, rate: Optional[str], host: Optional[Host] = None) -> None:
        """Limits what goes to that host (default: to every one), e.g. "1gbit"; None: no limit."""
        for h in [host] if host else self.hosts:
            if rate:
                self._in_switch("tc", "qdisc", "replace", "dev", h.name, "root", "tbf", "rate", rate, "burst", "1mb",
                                "latency", "50ms")
            else:
                with contextlib.suppress(LabError):
                    self._in_switch("tc", "qdisc", "del", "dev", h.name, "root")

    def set_delay(self, milliseconds: Optional[int]) -> None:
        """Makes the cable between the lab's two hosts so long, each way; None: short again. What goes to a
        host still passes set_rate(), after the delay. Guests' network cards (br0) are not delayed."""
        ports = [h.name for h in self.hosts]
        if len(ports) != 2:
            raise LabError("a delay is between two hosts")
        if self._delay is not None:
            self._delay.kill()
            self._delay.wait()
            self._children.remove(self._delay)
            self._delay = None
            for port in ports:
                self._in_switch("ip", "link", "set", port, "master", "br0")
        if milliseconds:
            program = build_delay()
            for port in ports:
                self._in_switch("ip", "link", "set", port, "nomaster")
            self._delay = self._spawn(["nsenter", "-t", str(self.switch), "-n", "--", str(program), *ports,
                                       str(milliseconds)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
            assert self._delay.stdout
            with self._delay.stdout as answer:
                if answer.readline() != b"ready\n":
                    raise LabError("the delaying relay did not start")

    def link_bytes(self, host: Host) -> int:
        """Bytes that went to that host under set_rate(), all headers included."""
        report = json.loads(_tool(["nsenter", "-t", str(self.switch), "-n", "--", "tc", "-s", "-j", "qdisc", "show",
                                   "dev", host.name]).stdout)
        return int(report[0]["bytes"])

    def set_link(self, host: Host, up: bool) -> None:
        """Plugs the host's cable in or out."""
        self._in_switch("ip", "link", "set", host.name, "up" if up else "down")

    # Guests and images.

    def guest(self, name: str, disks: Sequence[Disk] = (Disk("1G", data="256M"),), host: Optional[Host] = None,
              rate: Union[int, str] = 1000, memory: str = "512M", vcpus: int = 1, options: str = "",
              entropy: int = 100, unit: int = 4096, net: Optional[str] = None, devices: str = "",
              edit: Optional[Callable[[str], str]] = None, start: bool = True) -> Guest:
        """Makes the disks' images on `host` (default: the first), defines the guest there, starts it
        and waits until the witness is at work.

        rate: writes per second over all disks, "max" or "idle". options: more of the witness's settings
        (witness/witness.c), e.g. "w.zero=5 w.discard=5 w.vda.region=0,64M". net: "10.99.1.1/16" gives
        the guest a network card in br0 and a TCP echo server on port 7. devices: XML to add to
        <devices>. edit: changes the definition's XML before it is used.
        """
        host = host or self.a
        for h in self.hosts:
            h._install()
        disks = [dataclasses.replace(d) for d in disks]
        letters = {"virtio": "vd", "scsi": "sd"}
        for d in disks:
            if not d.target:
                used = {other.target for other in disks}
                d.target = next(t for t in (letters[d.bus] + c for c in "abcdefgh") if t not in used)
            d._create(host, name, entropy, unit)
        # loglevel=3: a panic is printed, an I/O error (KERN_ERR) is not: the kernel would print it into the
        # middle of a line of the witness, whose answer is then lost.
        words = ["console=ttyS0", "loglevel=3", "panic=-1", "random.trust_cpu=on", f"w.disks={len(disks)}", f"w.rate={rate}",
                 f"w.unit={unit}", f"w.entropy={entropy}"]
        words += [f"w.{d.target}.fill={d.data}" for d in disks if d.data]
        if net:
            words.append(f"w.net={net}")
            devices += "<interface type='bridge'><source bridge='br0'/><model type='virtio'/></interface>"
        if any(d.bus == "scsi" for d in disks):
            devices += "<controller type='scsi' model='virtio-scsi'/>"
        iothreads = sum(1 for d in disks if "iothread" in d.driver)
        # The first serial port is for output: QEMU appends to that file on whichever host the guest
        # runs, and waits for nobody. The second is for commands. (One port with a socket and QEMU's
        # own log of it does not do: while a client is slow, QEMU logs bytes twice.)
        # No balloon, no USB, no video: the guest boots in 2 s.
        xml = f"""
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='b'>{parse_size(memory)}</memory>
  <vcpu>{vcpus}</vcpu>
  {f"<iothreads>{iothreads}</iothreads>" if iothreads else ""}
  <os>
    <type arch='x86_64' machine='pc-q35-7.2'>hvm</type>
    <kernel>{BOOT}/vmlinuz</kernel>
    <initrd>{BOOT}/initrd</initrd>
    <cmdline>{' '.join(words + options.split())}</cmdline>
  </os>
  <features><acpi/></features>
  <cpu mode='custom' match='exact'><model>qemu64</model></cpu>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {''.join(d._xml() for d in disks)}
    <controller type='usb' model='none'/>
    <memballoon model='none'/>
    <serial type='file'>
      <source path='/var/log/libvirt/qemu/lab-{name}.log' append='on'/>
      <target port='0'/>
    </serial>
    <serial type='unix'>
      <source mode='bind' path='/var/lib/libvirt/qemu/lab-{name}.sock'/>
      <target port='1'/>
    </serial>
    {devices}
  </devices>
</domain>"""
        if edit:
            xml = edit(xml)
        guest = Guest(self, name)
        for h in self.hosts:
            guest._log(h).unlink(missing_ok=True)
        domain = host.libvirt().defineXML(xml)
        if start:
            domain.create()
            if TCG_FIX not in Path(f"/proc/{guest.qemu_pid(host)}/maps").read_text():
                raise LabError(f"{host.name}'s QEMU runs without {TCG_FIX}: make the lab anew")
            guest.wait_ready()
        return guest

    def compare(self, host1: Host, path1: str, host2: Host, path2: str, format1: str = "raw",
                format2: str = "raw") -> Optional[str]:
        """None if the two images hold the same data (an unallocated block is zeroes), else the first
        difference. Both may be in use."""
        p = subprocess.run(["qemu-img", "compare", "-U", "-p", "-f", format1, "-F", format2, str(host1.path(path1)),
                            str(host2.path(path2))], text=True, capture_output=True)
        if p.returncode == 0:
            return None
        return (p.stdout.strip().splitlines() or [""])[-1] + p.stderr.strip()

    @staticmethod
    def drop_caches() -> None:
        """Cold caches: what is read next comes from the disk."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")

    # Afterwards.

    def leftovers(self, ignore: Sequence[str] = (), settle: float = 3) -> list[str]:
        """What is on the hosts that should not be, one line each, "hosta: kind: what". Waits up to
        `settle` seconds for what is just ending, after all blocks of deleted files have been freed. `ignore`:
        patterns (fnmatch) of lines that are right."""
        for h in self.hosts:
            h.wait_freed()
        deadline = time.monotonic() + settle
        while True:
            lines = [f"{h.name}: {line}" for h in self.hosts for line in h.leftovers()]
            active: dict[str, list[str]] = {}
            for h in self.hosts:
                for d in h.libvirt().listAllDomains():
                    if d.isActive():
                        active.setdefault(d.name(), []).append(h.name)
            lines += [f"{' '.join(where)}: domain: {d} is active on more than one host" for d, where in active.items()
                      if len(where) > 1]
            for device, image in _loops_below(self.dir):
                if device not in self.loops and not Path(image).name.startswith("fs-"):
                    lines.append(f"machine: loop device: {device} ({image})")
            lines = [line for line in lines if not any(fnmatch.fnmatch(line, p) for p in ignore)]
            if not lines or time.monotonic() > deadline:
                return lines
            time.sleep(0.1)


class _Task(threading.Thread):
    """A function in a thread; result() waits for it and raises what it raised."""

    def __init__(self, function: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self._error: Optional[BaseException] = None
        self.start()

    def run(self) -> None:
        try:
            self._function()
        except BaseException as e:
            self._error = e

    def result(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def _loops_below(folder: Path) -> list[tuple[str, str]]:
    """(device, file) of the loop devices whose file is below that folder."""
    found = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            image = file.read_text().strip()
            if image.startswith(f"{folder}/"):
                found.append((f"/dev/{file.parent.parent.name}", image))
    return found


def _remove_lab_dir(folder: Path) -> None:
    def detached() -> bool:
        # A mounted one goes with the host's mount namespace, which the kernel ends in its own time.
        for device, _ in _loops_below(folder):
            subprocess.run(["losetup", "-d", device], capture_output=True)
        return not _loops_below(folder)
    with contextlib.suppress(LabError):
        wait_for("loop devices to be free", detached, 10)
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():
        raise LabError(f"could not remove all of {folder}")


# -------------------------------------------------------------------------------------- command line


def _enter_command(host: Host) -> str:
    return f"nsenter -t {host.pid} -m -u -i -n -p --wd=/proc/{host.pid}/root/root -- su -"


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="lab.py", description="Two virtualisation hosts on this machine.")
    parser.add_argument("--name", default="lab", help="which lab (default: %(default)s)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a lab that runs until `down`")
    up.add_argument("--hosts", type=int, default=2)
    up.add_argument("--drover", help="the program under test (default: $DROVER, else build/drover)")
    commands.add_parser("down", help="end it and remove everything")
    commands.add_parser("list", help="labs that are running")
    commands.add_parser("gc", help="remove what killed labs left")
    p = commands.add_parser("shell", help="a shell inside a host")
    p.add_argument("host")
    p = commands.add_parser("run", help="a command inside a host")
    p.add_argument("host")
    p.add_argument("cmd", nargs=argparse.REMAINDER)
    p = commands.add_parser("guest", help="make and start a guest with the witness")
    p.add_argument("guest")
    p.add_argument("--host")
    p.add_argument("--disk", action="append", metavar="SIZE[,FORMAT[,DATA]]",
                   help="e.g. 4G,raw,2G (default: 4G,raw,2G and 1G,qcow2,256M)")
    p.add_argument("--rate", default="1000", help="writes per second, max or idle (default: %(default)s)")
    p.add_argument("--memory", default="512M")
    p.add_argument("--net", metavar="ADDRESS/PREFIX", help="a network card, e.g. 10.99.1.1/16")
    p.add_argument("--options", default="", help="more settings of the witness, e.g. 'w.zero=5 w.discard=5'")
    p = commands.add_parser("status", help="the witness's last report")
    p.add_argument("guest")
    p = commands.add_parser("command", help="a command to the witness, e.g. full-verify")
    p.add_argument("guest")
    p.add_argument("text", nargs="+")
    p = commands.add_parser("destroy", help="end a guest and remove its disks")
    p.add_argument("guest")
    p = commands.add_parser("rate", help="limit all links: 1gbit, none")
    p.add_argument("rate")
    p = commands.add_parser("link", help="plug a host's cable in or out")
    p.add_argument("host")
    p.add_argument("state", choices=["up", "down"])
    commands.add_parser("leftovers", help="what a move left behind")
    args = parser.parse_args(argv)

    if args.command == "up":
        names = ["host" + "abcdefgh"[i] for i in range(args.hosts)]
        lab = Lab(names, args.name, args.drover, persist=True).up()
        print(f"lab {lab.name}: {', '.join(names)} are up. To enter one:")
        for h in lab.hosts:
            print(f"  {h.name}: {_enter_command(h)}")
        return 0
    if args.command in ("list", "gc"):
        for removed in Lab.collect_garbage():
            print(f"{removed}: removed what it left")
        for file in WORK.glob("*/state.json"):
            state = json.loads(file.read_text())
            print(f"{state['name']}: {', '.join(h['name'] for h in state['hosts'])}")
        return 0
    if args.command == "down":
        try:
            lab = Lab.attach(args.name)
        except LabError:
            if not (WORK / args.name).exists():
                raise
            file = WORK / args.name / "state.json"  # died meanwhile
            if file.exists():
                os.utime(file, (0, 0))
            Lab.collect_garbage()
            return 0
        lab.close()
        return 0

    lab = Lab.attach(args.name)
    if args.command == "shell":
        words = _enter_command(lab[args.host]).split()
        os.execvp(words[0], words)
    elif args.command == "run":
        return lab[args.host].popen(args.cmd).wait()
    elif args.command == "guest":
        disks = []
        for text in args.disk or ["4G,raw,2G", "1G,qcow2,256M"]:
            parts = text.split(",") + ["", ""]
            disks.append(Disk(parts[0], parts[1] or "raw", parts[2]))
        guest = lab.guest(args.guest, disks, lab[args.host] if args.host else None, args.rate, args.memory,
                          net=args.net, options=args.options)
        print(f"{guest.name} runs on {guest.host.name}")
    elif args.command == "status":
        guest = Guest(lab, args.guest)
        print(json.dumps({"host": guest.host.name, **guest.status()}, indent=1))
    elif args.command == "command":
        print(json.dumps(Guest(lab, args.guest).command(" ".join(args.text)), indent=1))
    elif args.command == "destroy":
        Guest(lab, args.guest).destroy()
    elif args.command == "rate":
        lab.set_rate(None if args.rate == "none" else args.rate)
    elif args.command == "link":
        lab.set_link(lab[args.host], args.state == "up")
    elif args.command == "leftovers":
        lines = lab.leftovers()
        print("\n".join(lines) or "nothing")
        return 1 if lines else 0
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except LabError as e:
        print(f"lab.py: {e}", file=sys.stderr)
        sys.exit(1)
