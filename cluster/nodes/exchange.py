"""How fast nodes talk to each other, two by two: which names the slow one, where an all-reduce has only the slowest.

In each round every node has another partner. A slow node is slow with all of them, and each of them with it alone: so a
node is taken to be as fast as with its best partner.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Callable, Sequence

ROUNDS = 3
FIRST_BYTES, MOST_BYTES = 1 << 18, 1 << 24  # both ways at once; the next amount is four times as much
ENOUGH_S = 0.1  # what took so long is not measured again with more
_HELLO = struct.Struct("!q")
_SECONDS = struct.Struct("!d")


def partner(place: int, count: int, number: int) -> int | None:
    """With whom the node at a place plays in a round of an all-play-all; None for one that sits out.

    In count - 1 rounds (count where that is odd) everybody meets everybody once.
    """
    ring = count - 1 + count % 2  # these turn; where there is one more, it stands still
    if place == ring:
        return next(other for other in range(ring) if (2 * other - number) % ring == 0)
    other = (number - place) % ring
    if other != place:
        return other
    return ring if ring < count else None


def listen(address: str) -> socket.socket:
    """A socket on which partners knock, on any port of an address."""
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=16)


def best_speed(
    door: socket.socket,
    rank: int,
    ranks: Sequence[int],
    address_of: Callable[[int], tuple[str, int]],
    seconds: float,
) -> float:
    """Bytes a second with the best of some partners; 0 where it reached none.

    Rounds have fixed ends, so that a partner who is held up in one round is still awaited in the next.
    """
    start, count = time.monotonic(), len(ranks)
    rounds = min(ROUNDS, count - 1 + count % 2)
    best = 0.0
    knocked: dict[int, socket.socket] = {}
    for number in range(rounds):
        place = partner(ranks.index(rank), count, number)
        if place is None:
            continue
        other, end = ranks[place], start + seconds * (number + 1) / rounds
        # Each has to reach the other, since a firewall may let only what comes from inside pass.
        with (
            contextlib.suppress(OSError),
            _knock(rank, address_of(other), end) as mine,
            _admit(door, other, knocked, end) as theirs,
        ):
            best = max(best, _speed(mine if rank < other else theirs, end))
    for connection in knocked.values():
        connection.close()
    return best


def _knock(rank: int, address: tuple[str, int], end: float) -> socket.socket:
    connection = socket.create_connection(address, timeout=max(0.01, end - time.monotonic()))
    connection.sendall(_HELLO.pack(rank))
    return connection


def _admit(door: socket.socket, other: int, knocked: dict[int, socket.socket], end: float) -> socket.socket:
    """The connection of a partner. Others that are a round ahead are kept waiting."""
    while other not in knocked:
        door.settimeout(max(0.01, end - time.monotonic()))
        connection, _ = door.accept()
        connection.settimeout(max(0.01, end - time.monotonic()))
        hello = connection.recv(_HELLO.size, socket.MSG_WAITALL)
        if len(hello) == _HELLO.size:
            knocked[_HELLO.unpack(hello)[0]] = connection
    return knocked.pop(other)


def _speed(connection: socket.socket, end: float) -> float:
    """The best of growing amounts, until two have taken long: one may have waited for a busy processor."""
    connection.setblocking(False)
    _swap(connection, bytes(1), end)  # both are here from now on
    best, size, long = 0.0, FIRST_BYTES, 0
    while long < 2:
        try:
            began = time.monotonic()
            _swap(connection, bytes(size), end)
            spent = time.monotonic() - began
            theirs = _SECONDS.unpack(_swap(connection, _SECONDS.pack(spent), end))[0]
        except TimeoutError:
            if best:
                break
            raise
        longest = max(spent, theirs, 1e-9)  # the same on both sides, which therefore stop together
        best = max(best, size / longest)
        if longest > ENOUGH_S or size >= MOST_BYTES:
            long += 1
        else:
            size *= 4
    return best


def _swap(connection: socket.socket, data: bytes, end: float) -> bytes:
    """Sends some bytes and receives as many, at the same time. Raises OSError after the end."""
    view, got = memoryview(data), bytearray(len(data))
    sent = received = 0
    while sent < len(data) or received < len(data):
        readable, writable, _ = select.select(
            [connection] if received < len(data) else [],
            [connection] if sent < len(data) else [],
            [],
            max(0.0, end - time.monotonic()),
        )
        if not readable and not writable:
            raise TimeoutError("timed out")
        if readable:
            fresh = connection.recv_into(memoryview(got)[received:])
            if not fresh:
                raise ConnectionError("the connection was closed")
            received += fresh
        if writable:
            sent += connection.send(view[sent:])
        if time.monotonic() > end:
            raise TimeoutError("timed out")
    return bytes(got)
