"""What the cluster's files say: slurm.conf and the rest, as text made from a layout and a place. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PORTS = 17000  # and upwards, a hundred a cluster: below the ephemeral range, and below the ports where ranks meet


@dataclass(frozen=True)
class Partition:
    """A queue. The higher tier preempts jobs of a lower one that may be requeued."""

    name: str
    tier: int
    preempt: str = "OFF"
    grace_s: int = 0
    default: bool = False


MAIN = Partition("main", 5, default=True)
LOW = Partition("low", 1, preempt="REQUEUE", grace_s=8)
HIGH = Partition("high", 10)


@dataclass(frozen=True)
class Layout:
    """How large the cluster is. Cores, memory and GPUs are pretended: Slurm counts them and nobody has them."""

    nodes: int = 4
    cpus: int = 8
    gpus: int = 2
    memory_mb: int = 16_000
    partitions: tuple[Partition, ...] = (MAIN, LOW, HIGH)


@dataclass(frozen=True)
class Place:
    """Where a cluster lives. All names and numbers that a machine has once come from its index."""

    folder: Path
    index: int
    host: str  # this machine's name
    namespaces: bool  # a node has its own; otherwise all nodes share the machine, and a node is a port
    user: str
    layout: Layout

    @property
    def names(self) -> tuple[str, ...]:
        # Without its own hosts file a node can only be reached by a name that is an address.
        numbers = range(1, self.layout.nodes + 1)
        return tuple(f"node{n:02d}" if self.namespaces else f"127.0.0.{n + 10}" for n in numbers)

    @property
    def bridge(self) -> str:
        return f"nsisl{self.index}"

    def cable(self, node: str) -> str:
        """The host's end of a node's network cable."""
        return f"{self.bridge}-{self.names.index(node) + 1}"

    @property
    def login(self) -> str:
        """The address of the host, where slurmctld and a person's commands run."""
        return f"198.18.{77 + self.index}.1" if self.namespaces else "127.0.0.1"

    def hardware_address(self, node: str) -> str:
        """That of its network card, which it keeps when it boots anew: the others have it in their tables."""
        return "02:00:" + ":".join(f"{int(octet):02x}" for octet in self.address(node).split("."))

    def address(self, node: str) -> str:
        return f"198.18.{77 + self.index}.{self.names.index(node) + 11}" if self.namespaces else node

    @property
    def port(self) -> int:
        """slurmctld's; those of the nodes follow."""
        return PORTS + 100 * self.index

    @property
    def scratch(self) -> Path:
        """The same path on each node, and another folder behind it."""
        return self.folder / "scratch"

    def own(self, node: str) -> Path:
        """What a node has for itself, as the host sees it."""
        return self.folder / "nodes" / node

    @property
    def log(self) -> Path:
        """slurmctld's, which tells why a job did what it did."""
        return self.folder / "slurmctld.log"

    @property
    def key(self) -> Path:
        return self.folder / "ssh" / "key"


def slurm_conf(place: Place) -> str:
    """Timeouts are short, so that a death is noticed in seconds; see man slurm.conf for each."""
    folder = place.folder
    return f"""\
ClusterName=nsi{place.index}
SlurmctldHost={place.host}({place.login})
SlurmctldPort={place.port}
SlurmdPort={place.port + 1}
SlurmUser={place.user}
SlurmdUser={place.user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/nodes/%n/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/nodes/%n/slurmd.pid
SlurmctldLogFile={place.log}
SlurmdLogFile={folder}/nodes/%n/slurmd.log
TmpFS={place.scratch}
MailProg=/bin/true
MpiDefault=none
# No cgroups: a machine, or its container, may have none to give.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/jobs.log
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
SlurmdTimeout=6
SlurmctldTimeout=10
MessageTimeout=5
TCPTimeout=2
BatchStartTimeout=5
KillWait=3
CompleteWait=0
InactiveLimit=0
MinJobAge=3600
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
{_nodes(place)}
{_partitions(place.layout)}
"""


def gres_conf(place: Place) -> str:
    """Links to a character device each: with a plain file Slurm would not set CUDA_VISIBLE_DEVICES."""
    gpus = place.layout.gpus
    return f"Name=gpu File={place.folder}/gpu[0-{gpus - 1}]\n" if gpus > 1 else f"Name=gpu File={place.folder}/gpu0\n"


def cgroup_conf() -> str:
    """Named though unused: Slurm looks for mounts to choose one, and stops where there are none."""
    return "CgroupPlugin=cgroup/v1\n"


def hosts(place: Place) -> str:
    """A node's /etc/hosts. The mapped forms keep torch from warning of peers that it cannot name."""
    lines = ["127.0.0.1 localhost", f"{place.login} login {place.host}"]
    for node in place.names:
        lines += [f"{place.address(node)} {node}", f"::ffff:{place.address(node)} {node}"]
    return "\n".join(lines) + "\n"


def sshd_config(place: Place) -> str:
    """A node's sshd: by key alone, and without a word to the machine's own settings."""
    folder = place.folder / "ssh"
    return f"""\
Port 22
HostKey {folder}/host
AuthorizedKeysFile {place.key}.pub
AuthenticationMethods publickey
PermitRootLogin prohibit-password
StrictModes no
UsePAM no
UseDNS no
PidFile none
"""


def ssh_config(place: Place) -> str:
    """For the host (`ssh -F`), and each node's /etc/ssh/ssh_config."""
    each = "".join(f"Host {node}\n    HostName {place.address(node)}\n" for node in place.names)
    return f"""\
{each}
Host *
    User root
    IdentityFile {place.key}
    IdentitiesOnly yes
    UserKnownHostsFile {place.folder}/ssh/known_hosts
    GlobalKnownHostsFile /dev/null
    StrictHostKeyChecking yes
    HostKeyAlias nsi
    LogLevel ERROR
"""


def _nodes(place: Place) -> str:
    layout = place.layout
    gpus = f" Gres=gpu:{layout.gpus}" if layout.gpus else ""
    return "\n".join(
        f"NodeName={node} NodeAddr={place.address(node)} NodeHostname={node if place.namespaces else place.host}"
        f" Port={place.port + number} CPUs={layout.cpus} RealMemory={layout.memory_mb}{gpus} State=UNKNOWN"
        for number, node in enumerate(place.names, start=1)
    )


def _partitions(layout: Layout) -> str:
    return "\n".join(
        f"PartitionName={each.name} Nodes=ALL Default={'YES' if each.default else 'NO'} PriorityTier={each.tier}"
        f" PreemptMode={each.preempt} GraceTime={each.grace_s} DefaultTime=30 MaxTime=INFINITE State=UP"
        for each in layout.partitions
    )
