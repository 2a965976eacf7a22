"""How test workers share the work: a file at a time, and all of tests/slurm as one, since it shares a cluster."""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling

SLURM = "tests/slurm/"


class ByFile(LoadScopeScheduling):
    """A file's tests share what its fixtures made. (xdist's own groups are lost on newer versions of pytest.)"""

    def _split_scope(self, nodeid: str) -> str:
        return SLURM if nodeid.startswith(SLURM) else nodeid.partition("::")[0]
