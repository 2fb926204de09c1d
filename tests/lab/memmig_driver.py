# SPDX-License-Identifier: Apache-2.0
"""Drives memmig_tool (tests/lab/memmig_tool.cc) inside a host, and stands in for drover's data path: qemu-nbd
on the target's images as the mirror's endpoint, a relay for the memory. For test_memmig.py and experiments.
"""
from __future__ import annotations

import json
import os
import shutil
import socket
import stat
import subprocess
import threading
from pathlib import Path
from typing import Any, Callable, Optional

from lab import REPO, Guest, Host, Lab, wait_for

TOOL = Path(os.environ.get("MEMMIG_TOOL", REPO / "build/tests/memmig_tool"))


class ToolError(Exception):
    def __init__(self, error: dict[str, Any]) -> None:
        super().__init__(f"{error['code']}: {error['message']}")
        self.code = error["code"]
        self.hint = error.get("hint", "")


class Tool:
    """One memmig_tool: call() waits for the answer, start() does not; events are kept in order."""

    def __init__(self, host: Host, source: str = "qemu:///system", target: Optional[str] = None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.answers: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._last_id = 0
        self._ended = False
        self._p = host.popen([str(TOOL), source] + ([target] if target else []), stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE, text=True)
        assert self._p.stdin and self._p.stdout
        first = json.loads(self._p.stdout.readline())
        if not first["ok"]:
            self._p.wait()
            raise ToolError(first["error"])
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._p.stdout
        for text in self._p.stdout:
            line = json.loads(text)
            with self._changed:
                if "id" in line:
                    self.answers[line["id"]] = line
                else:
                    self.lines.append(line)
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def start(self, what: str, **arguments: Any) -> int:
        assert self._p.stdin
        self._last_id += 1
        self._p.stdin.write(json.dumps({"id": self._last_id, "do": what, **arguments}) + "\n")
        self._p.stdin.flush()
        return self._last_id

    def _wait(self, condition: Callable[[], Any], timeout: float, what: str) -> Any:
        with self._changed:
            self._changed.wait_for(lambda: condition() or self._ended, timeout)
            value = condition()
            assert value, f"no {what}" + (": the tool has ended" if self._ended else f" within {timeout} s")
            return value

    def answer(self, number: int, timeout: float = 120) -> dict[str, Any]:
        return self._wait(lambda: self.answers.get(number), timeout, f"answer to request {number}")

    def result(self, number: int, timeout: float = 120) -> Any:
        line = self.answer(number, timeout)
        if not line["ok"]:
            raise ToolError(line["error"])
        return line.get("value")

    def call(self, what: str, timeout: float = 120, **arguments: Any) -> Any:
        return self.result(self.start(what, **arguments), timeout)

    def mirror(self, guest: str, disk: str) -> dict[str, Any]:
        """That disk's mirror, and whether it has bitmaps and how much they say."""
        there = self.call("attached", guest=guest)
        nothing = {"alive": False, "job": False, "node": False, "status": "", "error": "", "socket": ""}
        bitmaps = [b for b in there["bitmaps"] if b["disk"] == disk]
        return there["mirrors"].get(disk, nothing) | {"bitmap": bool(bitmaps), "dirty": sum(b["dirty"] for b in bitmaps)}

    def mark(self) -> int:
        with self._changed:
            return len(self.lines)

    def event(self, name: str, on: Optional[str] = None, mark: int = 0, timeout: float = 60,
              detail: Optional[str] = None) -> dict[str, Any]:
        def found() -> Optional[dict[str, Any]]:
            return next((e for e in self.lines[mark:] if e["event"] == name and on in (None, e.get("on"))
                         and detail in (None, e.get("detail"))), None)
        return self._wait(found, timeout, f"event {name} on {on}")

    def events(self, mark: int = 0) -> list[dict[str, Any]]:
        with self._changed:
            return [e for e in self.lines[mark:] if e["event"] != "progress"]

    def progress(self, mark: int = 0) -> list[dict[str, Any]]:
        with self._changed:
            return [e for e in self.lines[mark:] if e["event"] == "progress"]

    def kill(self) -> None:
        self._p.kill()
        self._p.wait()

    def close(self) -> None:
        assert self._p.stdin
        self._p.stdin.close()
        try:
            self._p.wait(60)
        finally:
            if self._p.poll() is None:
                self._p.kill()
                self._p.wait()
            self._reader.join(10)

    def __enter__(self) -> "Tool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 18):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for s in (source, target):
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


class Relay:
    """Every connection to the listening socket goes on to one that `connect` makes. cut() breaks them all."""

    def __init__(self, listener: socket.socket, connect: Callable[[], socket.socket]) -> None:
        self._listener = listener
        self._connect = connect
        self._pairs: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self.connections = 0
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = self._connect()
            except OSError:
                near.close()
                continue
            self.connections += 1
            self._pairs += [near, far]
            for a, b in ((near, far), (far, near)):
                t = threading.Thread(target=_copy, args=(a, b), daemon=True)
                t.start()
                self._threads.append(t)

    def cut(self) -> None:
        for s in self._pairs:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        self._accepting.join(10)
        self.cut()
        for t in self._threads:
            t.join(10)
        for s in self._pairs:
            s.close()


def unix_relay(source: Host, target: Host, path: str, uid: int, gid: int) -> Relay:
    """What QEMU on `source` sends to the socket `path` arrives at the socket `path` on `target`."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(source.path(path)))
    os.chown(source.path(path), uid, gid)
    listener.listen(64)

    def connect() -> socket.socket:
        far = socket.socket(socket.AF_UNIX)
        far.connect(str(target.path(path)))
        return far

    return Relay(listener, connect)


def _in_network_of(host: Host, function: Callable[[], Any]) -> Any:
    """Runs `function` in a thread inside the host's network namespace (only that thread enters it)."""
    result: list[Any] = []

    def body() -> None:
        import ctypes
        fd = os.open(f"/proc/{host.pid}/ns/net", os.O_RDONLY)
        try:
            if ctypes.CDLL(None, use_errno=True).setns(fd, 0x40000000) != 0:
                raise OSError(ctypes.get_errno(), "setns")
            result.append(function())
        except OSError as e:
            result.append(e)
        finally:
            os.close(fd)

    t = threading.Thread(target=body)
    t.start()
    t.join()
    if isinstance(result[0], OSError):
        raise result[0]
    return result[0]


def tcp_relay(source: Host, target: Host, port: int) -> Relay:
    """127.0.0.1:port on `source` leads to 127.0.0.1:port on `target`."""
    def listen() -> socket.socket:
        s = socket.socket()
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", port))
        s.listen(64)
        return s

    def connect() -> socket.socket:
        s = socket.create_connection(("127.0.0.1", port))
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return s

    return Relay(_in_network_of(source, listen), lambda: _in_network_of(target, connect))


class RpcRelay:
    """Between a libvirt client on `client_host` and the libvirtd of `server_host`, over their unix sockets: can lose
    the answer to one procedure, together with the connection, after everything that came before it."""

    FINISH3_PARAMS = 306  # libvirt's remote_protocol.x: REMOTE_PROC_DOMAIN_MIGRATE_FINISH3_PARAMS

    def __init__(self, client_host: Host, server_host: Host, path: str = "/run/relay-sock") -> None:
        self.path = path
        self._file = client_host.path(path)
        self._server = str(server_host.path("/run/libvirt/libvirt-sock"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._file))
        self._listener.listen(8)
        self.lose_answer_to: Optional[int] = None
        self.hold: Optional[threading.Event] = None  # the answer is lost only when this is set
        self.lost = threading.Event()
        self.answered: list[int] = []
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def uri(self) -> str:
        return f"qemu+unix:///system?socket={self.path}"

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.socket(socket.AF_UNIX)
            far.connect(self._server)
            self._sockets += [near, far]
            for target, args in ((_copy, (near, far)), (self._answers, (far, near))):
                t = threading.Thread(target=target, args=args, daemon=True)
                t.start()
                self._threads.append(t)

    def _answers(self, server: socket.socket, client: socket.socket) -> None:
        """Message by message. Each has a length, then program, version, procedure, type (1: answer), serial, status."""
        buffer = b""
        try:
            while data := server.recv(1 << 18):
                buffer += data
                while len(buffer) >= 28 and len(buffer) >= (length := int.from_bytes(buffer[:4], "big")):
                    message, buffer = buffer[:length], buffer[length:]
                    procedure, kind = (int.from_bytes(message[i:i + 4], "big") for i in (12, 16))
                    if kind == 1:
                        self.answered.append(procedure)
                        if procedure == self.lose_answer_to:
                            if self.hold is not None:
                                self.hold.wait(60)
                            self.lost.set()
                            return
                    client.sendall(message)
        except OSError:
            pass
        finally:
            for s in (server, client):
                try:
                    s.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

    def close(self) -> None:
        for s in [self._listener, *self._sockets]:
            try:
                s.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        for t in self._threads:
            t.join(10)
        for s in [self._listener, *self._sockets]:
            s.close()
        self._file.unlink(missing_ok=True)


class Endpoint:
    """qemu-nbd on an image of the target, reachable at a socket in the source guest's private directory."""

    def __init__(self, source: Host, path_in_source: str, target: Host, image: str, fmt: str, uid: int, gid: int,
                 export: str) -> None:
        self.socket = path_in_source
        self._file = source.path(path_in_source)
        # Started in the source host's namespaces, it could not see the image; on the machine it sees both.
        self._p = subprocess.Popen(["qemu-nbd", f"--socket={self._file}", f"--format={fmt}", f"--export-name={export}",
                                    "--shared=8", "--persistent", "--cache=none", "--discard=unmap",
                                    str(target.path(image))], stderr=subprocess.PIPE, text=True)

        def up() -> bool:
            assert self._p.poll() is None, self._p.stderr and self._p.stderr.read()
            return self._file.exists() and stat.S_ISSOCK(self._file.stat().st_mode)

        wait_for("qemu-nbd", up)
        os.chown(self._file, uid, gid)
        self.uri = f"nbd+unix:///{export}?socket={self._file}"

    def kill(self) -> None:
        self._p.kill()
        self._p.wait()

    def close(self) -> None:
        if self._p.poll() is None:
            self._p.terminate()
            try:
                self._p.wait(20)
            finally:
                if self._p.poll() is None:
                    self._p.kill()
                    self._p.wait()
        self._file.unlink(missing_ok=True)


class Move:
    """A move by hand: mirrors into qemu-nbd, copy while the guest is quiet, memory through a relay."""

    def __init__(self, lab: Lab, guest: Guest, target: Host, directory: str = "/var/lib/libvirt/images/moved",
                 scheme: str = "unix", target_uri: Optional[str] = None) -> None:
        self.lab, self.guest, self.source, self.target = lab, guest, guest.host, target
        self.directory, self.scheme = directory, scheme
        self.tool = Tool(self.source, target=target_uri or f"qemu+ssh://{target.name}/system?no_tty=1")
        self.info = self.tool.call("describe", guest=guest.name)
        self.uuid = self.info["uuid"]
        self.endpoints: dict[str, Endpoint] = {}
        self.paths: dict[str, str] = {}
        self.relay: Optional[Relay] = None
        self.memory_directory = f"/var/lib/libvirt/qemu/drover-{self.uuid[:8]}"
        self.uri = ""
        for side in ("source", "target"):
            self.tool.call("subscribe", on=side, guest=self.uuid)

    def attach(self) -> None:
        for host in (self.source, self.target):
            host.run(["mkdir", "-p", self.directory])
        for name, disk in self.info["disks"].items():
            path = f"{self.directory}/{self.guest.name}-{name}.{disk['format']}"
            self.target.run(["qemu-img", "create", "-q", "-f", disk["format"], path, str(disk["virtual_size"])])
            self.paths[name] = path
            self.endpoints[name] = Endpoint(self.source, f"{self.info['private_directory']}/drover-{name}.sock",
                                            self.target, path, disk["format"], self.info["qemu_uid"],
                                            self.info["qemu_gid"], name)
            self.tool.call("attach", guest=self.uuid, disk=name, node=disk["node"],
                           socket=self.endpoints[name].socket, export=name)

    def copy(self) -> None:
        """The guest must be quiet: there is no arbiter here."""
        exports = f"{self.info['private_directory']}/drover-export.sock"
        self.tool.call("export", guest=self.uuid, socket=exports,
                       disks={n: d["node"] for n, d in self.info["disks"].items()})
        try:
            for name in self.paths:
                subprocess.run(["qemu-img", "convert", "-n", "--target-is-zero", "-f", "raw", "-O", "raw",
                                f"nbd+unix:///{name}?socket={self.source.path(exports)}", self.endpoints[name].uri],
                               check=True)
        finally:
            self.tool.call("unexport", guest=self.uuid, socket=exports)

    def ready(self) -> None:
        """Disks equal, the guest writing to both sides, the memory's path open."""
        self.guest.command("stop")
        self.attach()
        self.copy()
        self.guest.command("start")
        self.open_memory_path()

    def open_memory_path(self, port: int = 49300) -> None:
        if self.scheme == "tcp":
            self.relay = tcp_relay(self.source, self.target, port)
            self.uri = f"tcp://127.0.0.1:{port}"
            return
        for host in (self.source, self.target):
            os.mkdir(host.path(self.memory_directory), 0o700)
            os.chown(host.path(self.memory_directory), self.info["qemu_uid"], self.info["qemu_gid"])
        path = f"{self.memory_directory}/memory"
        self.relay = unix_relay(self.source, self.target, path, self.info["qemu_uid"], self.info["qemu_gid"])
        self.uri = f"unix://{path}"

    def definition(self, live: bool) -> str:
        return self.tool.call("rewrite", xml=self.info["live_xml" if live else "inactive_xml"], paths=self.paths, live=live)

    def migrate(self, **options: Any) -> int:
        return self.tool.start("migrate", guest=self.uuid, live_xml=self.definition(True),
                               persistent_xml=self.definition(False), uri=self.uri, **options)

    def release(self) -> None:
        for endpoint in self.endpoints.values():
            endpoint.close()
        self.endpoints.clear()

    def detach(self) -> None:
        for name in self.info["disks"]:
            self.tool.call("detach", guest=self.uuid, disk=name)

    def hand_over(self, migration: int, mark: int) -> None:
        """All that comes after migrate(), when nothing goes wrong. mark: of before it."""
        self.tool.event("suspended", "target", mark)
        self.release()
        self.tool.call("resume", on="target", guest=self.uuid)
        self.tool.result(migration)
        self.finish()

    def finish(self) -> None:
        """After a move that went well: the source's images go."""
        for disk in self.info["disks"].values():
            self.source.path(disk["path"]).unlink(missing_ok=True)
        self.tool.call("undefine", guest=self.uuid)

    def close(self) -> None:
        try:
            self.release()
            if self.relay is not None:
                self.relay.close()
            for host in (self.source, self.target):
                shutil.rmtree(host.path(self.memory_directory), ignore_errors=True)
        finally:
            self.tool.close()

    def __enter__(self) -> "Move":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def milliseconds(begin: dict[str, Any], end: dict[str, Any]) -> float:
    return (end["time"] - begin["time"]) * 1000


__all__ = ["Endpoint", "Move", "Relay", "RpcRelay", "Tool", "ToolError", "TOOL", "milliseconds", "tcp_relay", "unix_relay"]
