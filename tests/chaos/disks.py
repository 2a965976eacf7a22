"""Real file systems that fill up or turn read-only under a run, and a disk that is slow.

A zygote in a mount namespace of its own sees them, and so do the ranks forked from it; nobody else does, but through
/proc. When the last of these processes ends, the kernel takes the mounts down.
"""

from __future__ import annotations

import contextlib
import errno
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.chaos.world import Zygote, zygote

_NAMESPACES = (("--mount",), ("--user", "--map-root-user", "--mount"))  # as root, or else as anybody
TMPFS = ("-t", "tmpfs")


@dataclass(frozen=True)
class Island:
    """A mount namespace with a zygote in it. Paths are those that its ranks use."""

    mother: Zygote
    enter: tuple[str, ...]  # a command that runs another one in the namespace

    def seen(self, path: Path) -> Path:
        """Where a path of the namespace lies for the rest of the world."""
        return Path(f"/proc/{self.mother.pid}/root") / path.relative_to("/")

    def mount(self, where: Path, *how: str) -> None:
        """Mounts something, as `mount HOW WHERE`."""
        subprocess.run([*self.enter, "mount", *how, str(where)], check=True)

    def unmount(self, where: Path) -> None:
        """Takes the uppermost mount away, though files of it may be open."""
        subprocess.run([*self.enter, "umount", "--lazy", str(where)], check=True)


@contextlib.contextmanager
def island(folder: Path) -> Iterator[Island | None]:
    """A namespace for as long as the block lasts; None where the machine grants none."""
    kind = next((kind for kind in _NAMESPACES if _is_granted(kind)), None)
    if kind is None:
        yield None
        return
    with zygote(folder, ("unshare", *kind)) as mother:
        user = ("--user", "--preserve-credentials") if "--user" in kind else ()
        yield Island(mother, ("nsenter", f"--target={mother.pid}", *user, "--mount"))


def fill(file: Path) -> int:
    """Takes all the room that a file system has left; returns how many bytes that was."""
    taken = 0
    with file.open("ab", buffering=0) as taker:
        try:
            while True:
                taken += taker.write(bytes(4096)) or 0
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
    return taken


def compiled(source: Path, folder: Path) -> Path | None:
    """A C file as a library to preload; None where there is no compiler."""
    library = folder / source.with_suffix(".so").name
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source, "-ldl"], check=True)
    except FileNotFoundError:
        return None
    return library


def _is_granted(kind: Sequence[str]) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        probe = ["unshare", *kind, "mount", *TMPFS, "none", folder]
        with contextlib.suppress(FileNotFoundError):
            return subprocess.run(probe, capture_output=True, check=False).returncode == 0
    return False
