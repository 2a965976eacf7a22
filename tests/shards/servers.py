"""Real servers on loopback for the tests of storage: one for HTTP that fails on demand, and one for S3."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from shards.reading.storage import Retries

QUICK = Retries(limit=3, first_wait_s=0.001, timeout_s=20.0)

# What a request can meet, besides a status such as 503:
CUT = "cut"  # half of the body, then the end
RESET = "reset"  # the connection reset instead of an answer
HOLD = "hold"  # half of the body, the rest once `go_on` is set
FLIP = "flip"  # a byte in the middle flipped


class FileServer(ThreadingHTTPServer):
    """Serves `files` by name, with ranges, and logs all requests. Also good enough an S3 for plain reads."""

    request_queue_size = 128  # with the usual 5, many connections at once wait a second for their second chance

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, bytes] = {}
        self.faults: defaultdict[str, deque[int | str]] = defaultdict(deque)  # by name, for its next requests
        self.serves_ranges = True
        self.requests: list[tuple[str, str | None]] = []  # name, range
        self.holding, self.go_on = threading.Event(), threading.Event()
        self.together = 0  # requests under way, and the most there were
        self.most_together = 0
        self.connections: list[socket.socket] = []
        self.lock = threading.Lock()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up, or are killed, belong to the tests; anything else is shown."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, name: str) -> int:
        """How often a file was asked for."""
        return sum(requested == name for requested, _ in self.requests)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # an answer goes out in three pieces, of which none should wait
    server: FileServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server, name = self.server, self.path.split("?")[0].lstrip("/")
        with server.lock:
            server.requests.append((name, self.headers["Range"]))
            fault = server.faults[name].popleft() if server.faults[name] else None
            server.together += 1
            server.most_together = max(server.most_together, server.together)
        try:
            if fault == RESET:
                self._reset()
            elif isinstance(fault, int) or name not in server.files:
                self._refuse(fault if isinstance(fault, int) else 404)
            else:
                self._serve(server.files[name], fault)
        finally:
            with server.lock:
                server.together -= 1

    def _serve(self, data: bytes, fault: str | None) -> None:
        status = 200
        if self.server.serves_ranges and self.headers["Range"]:
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            if int(first) >= len(data):
                return self._refuse(416)
            status, data = 206, data[int(first) : int(last) + 1]
        half = len(data) // 2
        if fault == FLIP:
            data = data[:half] + bytes([data[half] ^ 1]) + data[half + 1 :]
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[:half])
        if fault == CUT:
            self.close_connection = True
            return None
        if fault == HOLD:
            self.server.holding.set()
            self.server.go_on.wait()
        self.wfile.write(data[half:])
        return None

    def _refuse(self, status: int) -> None:
        code = {404: "NoSuchKey", 403: "AccessDenied", 503: "SlowDown"}.get(status, "Other")
        answer = f"<Error><Code>{code}</Code><Message>as told</Message></Error>".encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.close_connection = True
        os.close(self.connection.detach())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@contextmanager
def file_server() -> Iterator[FileServer]:
    server = FileServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()
        for connection in server.connections:  # clients keep theirs open for the next request
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def s3_environment(endpoint: str) -> Iterator[None]:
    """The variables that send this process, and those it starts, to an S3 at `endpoint`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", endpoint)
        patch.setenv("AWS_ACCESS_KEY_ID", "a")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_CONFIG_FILE", os.devnull)
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
        yield


@contextmanager
def s3_server() -> Iterator[Any]:
    """An S3 server, with the environment set. Gives a boto3 client of it."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        with s3_environment(f"http://{host}:{port}"):
            yield boto3.client("s3")
    finally:
        server.stop()
