"""Bytes that come front to back: of a file here, or of a URL that may break off at any moment and is taken up again."""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping
from http.client import HTTPException, HTTPResponse, InvalidURL
from pathlib import Path
from typing import NamedTuple, TypeAlias

import xxhash

from nsi.errors import UserError
from shards.reading.storage import PIECE_BYTES, Retries

# What a source says of itself (size, time, ETag), to tell whether it is still the same; None for what it keeps quiet.
Identity: TypeAlias = "Mapping[str, str | int | None]"

_PASSING_STATUSES = (408, 425, 429)


class Changed(Exception):
    """A source is not the one that was begun with; the text says what differs."""


def is_url(source: str) -> bool:
    """Whether a source lies on a web server."""
    return source.startswith(("http://", "https://"))


def label(source: str) -> str:
    """A source for messages: a URL without what may be secret in it, its query and password."""
    return re.sub(r"(?<=://)[^/?#]*@|[?#].*", "", source) if is_url(source) else source


def name_of(source: str) -> Identity:
    """What can be said of a source without touching it: a file keeps its name where its folder is moved."""
    if is_url(source):
        return {"name": label(source), "digest of its address": xxhash.xxh3_64_hexdigest(source.encode())}
    return {"name": Path(source).name}


def check_same(known: Identity, found: Identity) -> None:
    """Raises Changed where two identities contradict each other."""
    for key, value in found.items():
        if None not in (value, known.get(key)) and value != known[key]:
            raise Changed(f"its {key} was {known[key]} and is {value} now")


def fetch(source: str, start: int, retries: Retries, meet: Callable[[Identity], None]) -> Generator[bytes, None, None]:
    """The bytes of a source from `start` on, in pieces of at most 1 MiB. `meet` is told its identity before the first.

    Raises UserError where they cannot be had, Changed where a URL became another while it was read.
    """
    return _fetch_url(source, start, retries, meet) if is_url(source) else _fetch_file(source, start, meet)


def _fetch_file(path: str, start: int, meet: Callable[[Identity], None]) -> Generator[bytes, None, None]:
    try:
        with open(path, "rb", buffering=0) as file:
            facts = os.fstat(file.fileno())
            meet({"size": facts.st_size, "time in ns": facts.st_mtime_ns})
            if start:
                file.seek(start)
            while piece := file.read(PIECE_BYTES):
                yield piece
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its name and permissions") from None


class _Reply(NamedTuple):
    body: HTTPResponse
    start: int  # where in the source the body begins
    identity: Identity


class _Passing(Exception):
    """A failure that may pass."""


def _fetch_url(url: str, at: int, retries: Retries, meet: Callable[[Identity], None]) -> Generator[bytes, None, None]:
    """Each break is followed by a request for the rest. Tries are counted between two bytes, not over the whole."""
    known: Identity | None = None
    failures = 0
    while True:
        try:
            reply = _ask(url, at, retries.timeout_s)
            with reply.body:
                if known is None:
                    known = reply.identity
                    meet(known)
                check_same(known, reply.identity)
                for piece in _bytes_from(reply, at):
                    failures = 0
                    at += len(piece)
                    yield piece
            if known["size"] in (None, at):
                return
            problem = "the connection was cut"
        except (OSError, HTTPException, _Passing) as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        failures += 1
        if failures >= retries.limit:
            raise UserError(
                f"{label(url)}: cannot be read at byte {at}, tried {failures} times (the last: {problem}); "
                "check the network and run the same command again, it goes on where it stopped"
            )
        time.sleep(retries.wait_s(failures))


def _ask(url: str, at: int, timeout_s: float) -> _Reply:
    """Opens a URL at an offset, or before it. Raises OSError, HTTPException or _Passing for what may pass."""
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={at}-"} if at else {})
        body: HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:
            raise Changed(f"it has no byte {at} any more") from None
        if error.code in _PASSING_STATUSES or error.code >= 500:
            raise _Passing(f"HTTP {error.code} {error.reason}") from None
        raise UserError(f"{label(url)}: HTTP {error.code} {error.reason}; check the address") from None
    except (InvalidURL, ValueError):
        raise UserError(f"{label(url)}: no address that can be opened; check it") from None
    start, size = 0, body.headers["Content-Length"]
    if body.status == 206:
        span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", body.headers["Content-Range"] or "")
        if not span or int(span[1]) > at:
            body.close()
            raise UserError(f"{label(url)}: its server serves other ranges than it is asked for; download it first")
        start, size = int(span[1]), span[2]
    identity = {
        "size": int(size) if size and size.isdecimal() else None,
        "ETag": body.headers["ETag"],
        "Last-Modified": body.headers["Last-Modified"],
    }
    return _Reply(body, start, identity)


def _bytes_from(reply: _Reply, at: int) -> Iterator[bytes]:
    """What a reply holds from an offset on: a server that knows no ranges begins anew. Ends where the reply does."""
    position = reply.start
    # Counted here, since http.client ends in silence where a connection does, and older ones wait for more at the end.
    while position != reply.identity["size"] and (piece := reply.body.read1(PIECE_BYTES)):
        new = piece[max(0, at - position) :]
        position += len(piece)
        if new:
            yield new
