"""What a node finds out by itself, before it meets the others. Each check gives facts or raises UserError."""

from __future__ import annotations

import fcntl
import ipaddress
import os
import secrets
import socket
import struct
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from cluster.nodes.findings import Gpu
from nsi.errors import UserError

PACKAGES = ("torch", "timm", "deepspeed", "webdataset", "h5py", "accelerate", "prometheus-client", "numpy")
_DRIVERS = ("/proc/driver/nvidia/version", "/dev/kfd")  # NVIDIA's, AMD's
_SIOCGIFADDR = 0x8915


def node_name(env: Mapping[str, str]) -> str:
    """This node as Slurm calls it, else its host name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def package_versions() -> dict[str, str]:
    """The versions of the packages that training stands on, without importing them; "" for one that is missing."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def torch_build() -> tuple[str, str]:
    """torch's version with what it was built for, and the version of CUDA (or HIP) that is; "" for CPUs alone."""
    try:
        import torch
    except Exception as error:
        raise UserError(f"torch cannot be imported ({' '.join(str(error).split())[:200]}); install it again") from None
    return torch.__version__, torch.version.cuda or torch.version.hip or ""


def gpus_asked(given: int | None, env: Mapping[str, str]) -> int:
    """GPUs a node that the run wants: those of the Slurm job, unless told otherwise; none where it keeps to the CPU."""
    if env.get("DS_ACCELERATOR") == "cpu":
        return 0
    if given is not None:
        return given
    text = env.get("SLURM_GPUS_ON_NODE", "0")
    return int(text) if text.isdigit() else 0


def has_driver() -> bool:
    """Whether a driver of GPUs is loaded."""
    return any(Path(path).exists() for path in _DRIVERS)


def gpus() -> tuple[Gpu, ...]:
    """The GPUs that torch sees: those that CUDA_VISIBLE_DEVICES leaves, where it is set."""
    import torch

    return tuple(_gpu(place) for place in range(torch.cuda.device_count()))


def _gpu(place: int) -> Gpu:
    import torch

    try:
        free, total = torch.cuda.mem_get_info(place)
        return Gpu(torch.cuda.get_device_name(place), total, total - free)
    except RuntimeError as error:  # it has fallen off the bus, or somebody has it to himself
        return Gpu(f"GPU {place}", 0, 0, str(error).splitlines()[0])


def interface_towards(host: str, port: int) -> tuple[str, str]:
    """The interface whose address this node uses towards a host, and that address. No packet is sent.

    Raises UserError where the host has no address, or where the interface that GLOO_SOCKET_IFNAME names is not there.
    """
    names = [name for _, name in socket.if_nameindex()]
    wanted = os.environ.get("GLOO_SOCKET_IFNAME") or os.environ.get("NSI_INTERFACE") or ""
    for name in filter(None, wanted.split(",")):
        if name not in names:
            raise UserError(
                f"there is no interface {name!r}, only {', '.join(names)}; correct NSI_INTERFACE in slurm/site.sh, or "
                "leave it out"
            )
    if wanted:
        first = wanted.split(",")[0]
        return first, _address_of(first) or _address_towards(host, port)
    address = _address_towards(host, port)
    return next((name for name in names if _address_of(name) == address), ""), address


def check_host_name(interface: str, address: str) -> None:
    """Raises UserError where gloo, told of no interface, would offer the loopback to other nodes.

    It takes the address of the node's own name, and many a system has 127.0.1.1 for that.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or ipaddress.ip_address(address).is_loopback:
        return
    name = socket.gethostname()
    try:
        own = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0]
    except OSError:
        own = ""  # gloo takes the loopback then, too
    if not own or ipaddress.ip_address(own).is_loopback:
        raise UserError(
            f"its name {name} has {f'the address {own}' if own else 'no address'}, where other nodes do not find it; "
            f"set NSI_INTERFACE={interface} in slurm/site.sh"
        )


def _address_towards(host: str, port: int) -> str:
    try:
        places = socket.getaddrinfo(host, port or 9, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, place = min(places, key=lambda each: each[0])  # IPv4 where it has both
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)
            return probe.getsockname()[0].removeprefix("::ffff:")
    except OSError as error:
        raise UserError(f"no way to {host}, rank 0's host ({error.strerror}); correct MASTER_ADDR") from None


def _address_of(interface: str) -> str:
    """An interface's IPv4 address, "" where it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])


def leave_mark(folder: Path) -> str:
    """Writes a small file of a new name into a folder, made where it is missing. Returns the name.

    The others look for it by that name, which they have never asked for: a listing, or a name that was missing a
    moment ago, may come from their caches. Raises UserError where it cannot be written.
    """
    name = f"mark-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / name).open("x") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); choose another --log_path") from None
    return name


def scratch_free(folder: Path) -> int:
    """Free bytes of a scratch folder that can be written. Raises UserError where it cannot."""
    help_ = "correct NSI_SCRATCH in slurm/site.sh, or leave it out"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 16))
            os.fsync(file.fileno())
        disk = os.statvfs(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}); {help_}") from None
    return disk.f_bavail * disk.f_frsize


def file_bytes(path: Path) -> int:
    """The size of a file that can be read. Raises UserError where it cannot."""
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{path}: is empty; fetch the weights again")
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); correct --backbone_weights") from None
