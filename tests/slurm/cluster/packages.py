"""The Debian packages that the cluster is made of: which are missing, and how to get them and start no service."""

from __future__ import annotations

import os
import shutil
import subprocess

from tests.slurm.cluster.places import locked

NEEDED = {  # a program, and the package that has it
    "slurmctld": "slurmctld",
    "slurmd": "slurmd",
    "srun": "slurm-client",
    "munged": "munge",
    "ip": "iproute2",
    "ssh": "openssh-client",
    "sshd": "openssh-server",
    "pdsh": "pdsh",
    "promtool": "prometheus",
}
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
INSTALL_S = 600
# A machine that wanted none of these services gets none: neither now (policy-rc.d) nor at its next start (disable).
SCRIPT = r"""
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' > "$policy" && chmod 755 "$policy" || exit 1
fi
export DEBIAN_FRONTEND=noninteractive
get() { apt-get install --yes --quiet --no-install-recommends -o DPkg::Lock::Timeout=120 "$@"; }
get "$@" || { apt-get update --quiet && get "$@"; } || exit 1
if command -v systemctl > /dev/null; then
    for package in "$@"; do
        units="$(dpkg -L "$package" | sed -nE 's#^(/usr)?/lib/systemd/system/([^@/]+[.](service|socket))$#\2#p')"
        for unit in $units; do
            systemctl --quiet disable "$unit" 2> /dev/null
        done
    done
fi
exit 0
"""


def missing() -> list[str]:
    """Packages whose program is not to be found."""
    return [package for program, package in NEEDED.items() if shutil.which(program, path=PATH) is None]


def install() -> str:
    """Installs what is missing, as root or by sudo without a password. Returns why not, and what to do; or nothing."""
    if not missing():
        return ""
    with locked():  # whoever waited here finds the work done
        wanted = missing()
        if not wanted:
            return ""
        how = f"apt-get install --no-install-recommends {' '.join(wanted)}"
        if shutil.which("apt-get", path=PATH) is None:
            return f"no apt-get here; the cluster needs what Debian calls {' '.join(wanted)}"
        root = [] if os.getuid() == 0 else ["sudo", "-n"]
        if root and (shutil.which("sudo") is None or subprocess.run([*root, "true"], capture_output=True).returncode):
            return f"installing packages needs root; sudo {how}"
        print(f"Installing for the Slurm tests: {' '.join(wanted)}", flush=True)
        return _install([*root, "sh", "-c", SCRIPT, "sh", *wanted], how)


def _install(command: list[str], how: str) -> str:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=INSTALL_S
        )
    except subprocess.TimeoutExpired:
        return f"apt-get takes more than {INSTALL_S} s; {how}"
    errors = [line for line in done.stderr.splitlines() if line.startswith("E:")] or done.stderr.splitlines() or ["?"]
    return f"apt-get failed ({errors[-1]}); {how}" if done.returncode or missing() else ""
