"""Ends parts of a cluster as machines do, and stands between a client and its storage."""

import http.client
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, TypeVar
from urllib.parse import urlsplit

from cluster import processes
from cluster.local import RayCluster, S3Server
from common import storage

T = TypeVar("T")
Fault = Literal["none", "500", "503", "slow", "cut"]
HOP_BY_HOP = {"connection", "expect", "keep-alive", "transfer-encoding"}


def wait_until(true: Callable[[], T], timeout_s: float = 200) -> T:
    """What `true()` returned, once it is."""
    deadline = time.monotonic() + timeout_s
    while not (value := true()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.2)
    return value


def commands(mark: str, *words: str) -> dict[int, list[str]]:
    """By pid, the commands of the processes that carry `mark` and have all these words in their command."""
    found = {pid: processes.command(pid) for pid in processes.alive(mark)}
    return {pid: command for pid, command in found.items() if all(word in "\0".join(command) for word in words)}


def kill(mark: str, *words: str) -> list[list[str]]:
    """SIGKILL the processes with these words in their command, once there are some; the commands."""
    found = wait_until(lambda: commands(mark, *words))
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    return list(found.values())


def kill_node(nodes: RayCluster, task: str) -> int:
    """SIGKILL a node other than the head while a worker of it runs `task`, and that with it; the node's place."""

    def busy() -> list[tuple[int, int]]:
        raylets = {
            pid: place
            for place in range(1, len(nodes.nodes))
            for pid in commands(nodes.mark, "raylet/raylet", f"{nodes.temp}/{place}/")
        }
        found = [(pid, processes.parent(pid)) for pid in commands(nodes.mark, task)]
        return [(pid, raylets[parent]) for pid, parent in found if parent in raylets]

    pid, place = wait_until(busy)[0]
    os.kill(pid, signal.SIGKILL)  # first: a task ends soon
    nodes.kill_node(place)
    return place


def stop_storage(server: S3Server) -> list[str]:
    """Kill the S3 server; its command."""
    ((_, *argv),) = kill(server.mark, "weed", "mini")
    return argv


def start_storage(server: S3Server, argv: list[str]) -> None:
    weed = processes.path().partition(":")[0] + "/weed"
    folder = Path(next(a for a in argv if a.startswith("-dir=")).removeprefix("-dir=")).parent
    processes.start([weed, *argv], dict(os.environ), server.mark, folder / "s3.log")


def answers(url: str) -> bool:
    try:
        return bool(list(storage.list_files(url)))
    except storage.StorageError:
        return False


class Proxy:
    """Passes requests on to an S3 server; `fault` decides, per request, what goes wrong with it.

    A signature covers the Host header, so that goes through as the client sent it.
    """

    def __init__(self, target: str) -> None:
        self.target = urlsplit(target)
        self.fault: Callable[[str, str], Fault] = lambda method, path: "none"
        self.injected: list[tuple[str, str, Fault]] = []

    @contextmanager
    def serving(self) -> Iterator[str]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *arguments: Handler(self, *arguments))
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, proxy: Proxy, *arguments: object) -> None:
        self.proxy = proxy
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *arguments: object) -> None:
        pass

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        body = self._body()
        fault = self.proxy.fault(self.command, self.path)
        if fault != "none":
            self.proxy.injected.append((self.command, self.path, fault))
        if fault in ("500", "503"):
            self._answer(int(fault), {}, b"")
            return
        if fault == "slow":
            time.sleep(3)
        connection = http.client.HTTPConnection(self.proxy.target.netloc, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in HOP_BY_HOP:
                    connection.putheader(name, value)
            if body and "content-length" not in self.headers:  # it came in chunks
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            response = connection.getresponse()
            headers = {k: v for k, v in response.getheaders() if k.lower() not in HOP_BY_HOP | {"content-length"}}
            length = response.getheader("content-length")
            data = response.read()
        except OSError:
            self.close_connection = True
            return
        finally:
            connection.close()
        self._answer(response.status, headers, data, length, cut=fault == "cut")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("content-length") or 0))

    def _answer(
        self, status: int, headers: dict[str, str], data: bytes, length: str | None = None, cut: bool = False
    ) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", (length if self.command == "HEAD" else None) or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        if cut:
            self.close_connection = True
