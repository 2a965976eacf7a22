"""Finds ranks that died or hang, and ends all of them within seconds, with the stacks of each on disk.

Each rank has a thread that tells rank 0 every second where its main thread is. A rank that dies closes its
connection; one whose machine is gone or frozen falls silent; one that hangs speaks, but does not move. Rank 0 says who
it is, all write their stacks, and all leave: nobody gets out of a collective by other means, and NCCL waits for half
an hour. The collective and the line of the program are read off the stacks.

The connections form a star around rank 0, apart from the process group, which may be what hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import secrets
import selectors
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from cluster.collectives import share
from cluster.records.clock import Clock
from cluster.watch.whereabouts import Beat, hang, slowness, where_is
from cluster.world import World
from nsi.errors import UserError

TICK_S = 1.0
SILENCE_S = 30.0  # without a word: the machine is gone, cut off or frozen
STACKS_S = 5.0  # to write them: the shared folder may stand still, and be why the process ends
FAREWELL_S = 2.0  # in which ranks leave by themselves when another has failed, as most do
LATE_S = 10.0  # a tick so late means that we were frozen ourselves (a laptop slept), not all the others
STUCK_S = 600.0  # without a tick: the interpreter itself is stuck, and only a thread without it can end the process
CONNECT_S = 60.0
STEPS = 33  # whose median is a rank's pace: one slow step makes no straggler
FEWEST_STEPS = 5  # that say something


class Watchdog:
    """The watch of one rank."""

    def __init__(
        self,
        world: World,
        clock: Clock,
        hang_s: float,
        stacks: Callable[[], Path],
        look: Callable[[], str | None],
        farewell: Callable[[str], None],
    ) -> None:
        """`stacks` says which folder the ranks' stacks go to, `look` is asked every tick for another reason to end at
        once, and `farewell` told of any, before the process ends; all from the watchdog's thread."""
        self._world, self._clock, self._hang_s, self._stacks = world, clock, hang_s, stacks
        self._look, self._farewell = look, farewell
        self._node = socket.gethostname()
        self._moved = clock.place.moves, time.monotonic()
        self._own_s: deque[float] = deque(maxlen=STEPS)
        self._slowness: dict[int, float] = {}
        self._links: dict[socket.socket, _Link] = {}
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._listener, self._token = self._meet()

    def note(self, own_s: float) -> None:
        """Tells how long this rank took for its own part of a step, before it met the others."""
        self._own_s.append(own_s)

    def slowness(self) -> dict[int, float]:
        """By rank, its own part of a step as a multiple of the median rank's; on rank 0 all, on others their own."""
        return self._slowness

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    def stop(self, in_order: bool) -> None:
        """Ends the watch; unless it is `in_order`, the other ranks will be ended."""
        if in_order:
            self._tell({"bye": True})
        self._wake.send(b".")
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        for each in (self._wake, self._woken, *self._links, *([self._listener] if self._listener else [])):
            each.close()

    def _meet(self) -> tuple[socket.socket | None, str]:
        """Rank 0 listens, the others connect."""
        world, listener = self._world, None
        if world.size > 1 and world.rank == 0:
            listener = _listen(world)
        port, token = share((listener.getsockname()[1], secrets.token_hex(16)) if listener else (0, ""))
        if world.rank:
            try:
                link = _Link(socket.create_connection((world.master_addr, port), CONNECT_S))
            except OSError as error:
                raise UserError(
                    f"rank {world.rank} ({self._node}) cannot reach rank 0 at {world.master_addr}:{port} "
                    f"({error.strerror or error}); let the nodes talk to each other on all ports"
                ) from None
            link.name, link.rank = f"rank 0 ({world.master_addr})", 0
            self._links[link.socket] = link
            link.send({"token": token, "rank": world.rank, "node": self._node})
        return listener, token

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for each in (self._woken, *self._links, *([self._listener] if self._listener else [])):
                selector.register(each, selectors.EVENT_READ)
            last = time.monotonic()
            began = last
            while True:
                for key, _ in selector.select(max(0.0, last + TICK_S - time.monotonic())):
                    if key.fileobj is self._woken:
                        return
                    self._hear(key.fileobj, selector)
                now = time.monotonic()
                if now - last < TICK_S:
                    continue
                if now - last > LATE_S:
                    self._begin_anew(now)
                last = now
                beat = self._beat(now)
                self._tell(asdict(beat) if self._world.rank else {})
                if reason := self._look() or (not self._world.rank and self._judge(beat)):
                    self._end(reason)
                if reason := self._lost(now, began):
                    waits = f", and waits in {beat.collective}" if beat.collective else ""
                    where = f"rank {beat.rank} is at {beat.at}{waits}, after step {beat.step}"
                    self._end(f"{reason} ({where})")

    def _beat(self, now: float) -> Beat:
        place = self._clock.place
        if place.moves != self._moved[0]:
            self._moved = place.moves, now
        at, collective = where_is(sys._current_frames().get(threading.main_thread().ident or 0))
        if self._world.size > 1 and sys.__stderr__ is not None:
            with contextlib.suppress(OSError, ValueError):  # no stderr, no stacks
                faulthandler.dump_traceback_later(STUCK_S, exit=True, file=sys.__stderr__)
        idle_s = now - self._moved[1]
        last_s = list(self._own_s)
        own_s = statistics.median(last_s) if len(last_s) >= FEWEST_STEPS else 0.0
        return Beat(self._world.rank, self._node, place.step, place.bucket, place.moves, idle_s, at, collective, own_s)

    def _hear(self, source: Any, selector: selectors.BaseSelector) -> None:
        if source is self._listener:
            with contextlib.suppress(OSError):
                accepted, _ = source.accept()
                self._links[accepted] = _Link(accepted)
                selector.register(accepted, selectors.EVENT_READ)
            return
        link = self._links[source]
        for word in link.receive():
            if link.rank is None:  # a stranger, who found the port by chance, does not know the token
                if word.get("token") == self._token:
                    link.rank, link.name = word["rank"], f"rank {word['rank']} ({word['node']})"
            elif "bye" in word:
                link.left = True
            elif "end" in word:
                self._end(word["end"], word.get("found_by", ""))
            elif "moves" in word:
                link.beat = Beat(**word)
            elif "slowness" in word:
                self._slowness = {self._world.rank: word["slowness"]}
        if link.gone_s is not None:
            selector.unregister(source)

    def _lost(self, now: float, began: float) -> str | None:
        """Whom we have not heard of, or who is gone, in words."""
        for link in self._links.values():
            if link.left or link.rank is None:
                continue
            if link.gone_s is not None and now - link.gone_s > FAREWELL_S:
                return f"{link.name} died or gave up; its own last line may say why"
            if now - link.heard_s > SILENCE_S:
                return f"no word from {link.name} for {SILENCE_S:.0f} s: its machine is gone, cut off or frozen"
        if self._listener and now - began > CONNECT_S + SILENCE_S:
            missing = set(range(1, self._world.size)) - {link.rank for link in self._links.values()}
            if missing:
                return f"rank {min(missing)} never reported to rank 0"
        return None

    def _judge(self, own: Beat) -> str | None:
        """Rank 0's look at all ranks."""
        beats = [own, *(link.beat for link in self._links.values() if link.beat and not link.left)]
        self._slowness = slowness(beats) if len(beats) == self._world.size else {}
        for link in self._links.values():
            if link.rank is not None and link.rank in self._slowness:
                link.send({"slowness": self._slowness[link.rank]})
        return hang(beats, self._hang_s) if len(beats) == self._world.size else None

    def _begin_anew(self, now: float) -> None:
        """After we were frozen nobody's silence or rest counts."""
        self._moved = self._moved[0], now
        for link in self._links.values():
            link.heard_s = now

    def _tell(self, word: dict[str, Any]) -> None:
        for link in list(self._links.values()):
            link.send(word)

    def _end(self, reason: str, found_by: str = "") -> NoReturn:
        """Ends this process, and before it all others."""
        self._tell({"end": reason, "found_by": f"rank {self._world.rank}"})
        where = self._write_stacks()
        with contextlib.suppress(Exception):  # whatever happens, the process ends
            self._farewell(reason)
        self._let_them_hear()
        told = f" (rank {self._world.rank}, told by {found_by})" if found_by else ""
        print(f"nsi train: {reason}{told}; the stacks are in {where}", file=sys.stderr, flush=True)
        os._exit(1)

    def _let_them_hear(self) -> None:
        """Waits a moment for the others to hang up. To leave with words of theirs unread would reset the connection,
        and take our last words from them."""
        end = time.monotonic() + FAREWELL_S
        for link in self._links.values():
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
                link.socket.settimeout(max(0.0, end - time.monotonic()))
                while link.socket.recv(1 << 16):
                    link.socket.settimeout(max(0.0, end - time.monotonic()))

    def _write_stacks(self) -> str:
        path = self._stacks() / f"rank-{self._world.rank:05d}.txt"
        written: list[Path] = []

        def write() -> None:
            with contextlib.suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("w") as file:
                    faulthandler.dump_traceback(file, all_threads=True)
                written.append(path)

        writing = threading.Thread(target=write, name="stacks", daemon=True)
        writing.start()
        writing.join(STACKS_S)
        if written:
            return str(path.parent)
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        return "this log"


def _listen(world: World) -> socket.socket:
    """Rank 0's listener, on any free port: where there is IPv6, for both, since nodes may know one name by either."""
    if socket.has_dualstack_ipv6():
        listener = socket.create_server(("", 0), family=socket.AF_INET6, backlog=world.size, dualstack_ipv6=True)
    else:
        family = socket.getaddrinfo(world.master_addr, None)[0][0]
        listener = socket.create_server(("", 0), family=family, backlog=world.size)
    listener.setblocking(False)
    return listener


class _Link:
    """A connection that carries JSON lines, and what is known of the rank at its other end."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.rank: int | None = None  # until it has said who it is
        self.name = ""
        self.beat: Beat | None = None
        self.heard_s = time.monotonic()
        self.gone_s: float | None = None  # when the other end closed
        self.left = False  # in order
        self._rest = b""

    def send(self, word: dict[str, Any]) -> None:
        """Says something, if the other end still listens."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(word).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has been said since the last time."""
        try:
            data = self.socket.recv(1 << 16)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        self.heard_s = time.monotonic()
        if not data:
            self.gone_s = self.heard_s
        *lines, self._rest = (self._rest + data).split(b"\n")
        words = []
        for line in lines:
            with contextlib.suppress(ValueError):
                words.append(json.loads(line))
        return [word for word in words if isinstance(word, dict)]


@contextlib.contextmanager
def watching(watchdog: Watchdog) -> Iterator[Watchdog]:
    """Watches as long as the block runs; a block that fails takes all ranks down."""
    watchdog.start()
    try:
        yield watchdog
    except BaseException:
        watchdog.stop(in_order=False)
        raise
    watchdog.stop(in_order=True)
