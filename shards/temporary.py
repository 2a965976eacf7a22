"""Files under temporary names: whose they are, and who may remove them."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

TEMPORARY = ".tmp"


def temporary_mark() -> str:
    """The end of a temporary name: it tells which process of which machine is at work on the file."""
    return f"{_machine()}.{os.getpid()}{TEMPORARY}"


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes of this machine left under temporary names; other machines' may be at work."""
    for path in folder.glob(f"*.{_machine()}.*{TEMPORARY}"):
        pid = path.name.removesuffix(TEMPORARY).rpartition(".")[2]
        if pid.isdigit() and not _is_alive(int(pid)):
            path.unlink(missing_ok=True)


def _machine() -> str:
    """This machine, and the container in it: two containers may share a name, and give one number to two processes."""
    with contextlib.suppress(OSError):
        namespace = os.readlink("/proc/self/ns/pid")  # pid:[4026531836]
        return f"{socket.gethostname()}-{namespace.strip('pid:[]')}"
    return socket.gethostname()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
