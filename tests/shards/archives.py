"""Archives for tests, as `tarfile` writes them, and a real web server that breaks off where it is told to."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from shards.sources.folder import list_folder
from shards.sources.listing import Folder, places_in, read_scenes
from shards.sources.scene import Place, read_place

ROOT = "clevrtexv2_full"

Files = Sequence[tuple[str, bytes]]


def files_of(scenes: Path, count: int) -> Files:
    """Names and bytes of the first scenes below a folder, each with two passes that nobody reads."""
    files = []
    for folder in list_folder(scenes)[:count]:
        inside = Path(folder.name).relative_to(scenes)
        files += [(f"{inside}/{name}", read_place(place)) for name, place in sorted(places_in(folder).items())]
        files += [(f"{inside}/{inside.name}_{each}_0003.png", each.encode() * 700) for each in ("depth", "shadow")]
    return files


def archive_of(files: Files, format: int = tarfile.PAX_FORMAT, more: Sequence[tarfile.TarInfo] = ()) -> bytes:
    """An archive of files, then of members without bytes."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=format) as archive:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in more:
            archive.addfile(info)
    return data.getvalue()


def link(name: str, target: str, type: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A symbolic or hard link in an archive."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, target
    return info


def scenes_in(folders: Sequence[Folder]) -> dict[str, list[bytes]]:
    """Every scene's three members, byte for byte, by key, in order."""
    found = {}
    for scene in read_scenes(folders)[0]:
        assert isinstance(scene.json, Place)
        assert isinstance(scene.image, Place)
        assert isinstance(scene.mask, Place)
        found[scene.key] = [read_place(place) for place in (scene.json, scene.image, scene.mask)]
    return found


def bytes_in(folders: Sequence[Folder]) -> Mapping[str, Mapping[str, bytes]]:
    """The bytes of every member, by folder and name."""
    return {
        folder.name: {name: read_place(place) for name, place in sorted(places_in(folder).items())}
        for folder in folders
    }


class ArchiveServer(ThreadingHTTPServer):
    """Serves one body under any path, and logs at which byte each request began."""

    def __init__(self, body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.body = body
        self.etag: str | None = '"one"'
        self.serves_ranges = True
        self.says_length = True
        self.is_chunked = False
        self.refusals: list[int] = []  # statuses for the next requests
        self.cuts: list[int] = []  # offsets at which the next connections are cut
        self.hold_at: int | None = None  # the offset from which on nothing is sent
        self.asked: list[int] = []

    def url(self, name: str = "clevrtex.tar") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class _Handler(BaseHTTPRequestHandler):
    server: ArchiveServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def setup(self) -> None:
        super().setup()
        self.protocol_version = "HTTP/1.1" if self.server.is_chunked else "HTTP/1.0"

    def do_GET(self) -> None:
        server = self.server
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        server.asked.append(start)
        self.close_connection = True
        if server.refusals:
            return self._answer(server.refusals.pop(0), {"Content-Length": "0"})
        if start and start >= len(server.body):
            return self._answer(416, {"Content-Length": "0"})
        headers = {"ETag": server.etag} if server.etag else {}
        if start and server.serves_ranges:
            headers["Content-Range"] = f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"
        else:
            start = 0
        if server.is_chunked:
            headers["Transfer-Encoding"] = "chunked"
        elif server.says_length:
            headers["Content-Length"] = str(len(server.body) - start)
        self._answer(206 if "Content-Range" in headers else 200, headers)
        end = min(server.cuts.pop(0) if server.cuts else len(server.body), server.hold_at or len(server.body))
        try:
            self._send(server.body[start:end])
            if server.is_chunked and end == len(server.body):
                self.wfile.write(b"0\r\n\r\n")
            if server.hold_at is not None:
                self.connection.recv(1)  # until the client is gone
        except OSError:
            pass
        return None

    def _send(self, data: bytes) -> None:
        if not self.server.is_chunked:
            self.wfile.write(data)
            return
        for start in range(0, len(data), 10_000):
            chunk = data[start : start + 10_000]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))

    def _answer(self, status: int, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""


@contextmanager
def archive_server(body: bytes) -> Iterator[ArchiveServer]:
    """A server on loopback, on a port of its own."""
    server = ArchiveServer(body)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
