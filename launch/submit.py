"""`nsi submit [SLURM OPTIONS] SCRIPT ARGS`: the same line as sbatch, checked before it is given to sbatch."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.nodes.partitions import Partition, chosen, explain, parse_kinds, parse_partitions
from cluster.nodes.sbatch import Line, script_options, seconds, signal_lead, split_line, values, variable_options
from launch.submit_checks import Finding, Job, findings, parse_arguments, port_findings
from launch.submit_text import HELP, duration, told
from nsi.errors import UserError

FILLED_IN = ("account", "partition", "qos", "constraint")
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_ASK_S = 120.0  # Slurm's commands wait for a controller that does not answer, themselves
_WORK_S = 60  # the least that must be left beside saving


@dataclass(frozen=True)
class Checked:
    """A job that nothing speaks against but, perhaps, Slurm."""

    line: Line
    script: str  # its name without the folder
    config: Any  # what its verb makes of its arguments
    asked: Mapping[str, str]  # sbatch's options by name, the site's too
    more: tuple[str, ...]  # the site's as words; they stand first, so that what the person gave wins
    partitions: Sequence[Partition]

    def refused(self, said: str) -> UserError:
        """Why sbatch does not take it."""
        kinds = parse_kinds(_ask(["sinfo", "--noheader", "--format=%R|%D|%c|%m|%G"]).stdout)
        return UserError(explain(said, self.asked, self.partitions, kinds))


def main(arguments: Sequence[str]) -> None:
    """Checks and submits. Raises UserError where the job would not run."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    job = _check(split_line(arguments))
    tested = _ask(["sbatch", "--test-only", *job.line.words(job.more)])
    if tested.returncode:
        raise job.refused(tested.stderr)
    if "test-only" in job.asked:
        print(tested.stderr.strip())
    else:
        _submit(job)


def _check(line: Line) -> Checked:
    """All that can be known before sbatch is asked."""
    script = Path(line.script)
    try:
        text = script.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{script}: cannot be read ({why}); name one of slurm/*.sbatch") from None
    site = read_site(script.parent, os.environ)
    given = values(script_options(text), variable_options(os.environ), line.options)
    filled = {name: value for name in FILLED_IN if (value := site.get(f"NSI_{name.upper()}", "")) and name not in given}
    asked = {**filled, **given}
    config = parse_arguments(script.name, line.arguments)
    stop_at(findings(Job(script.name, config, asked, Path(asked.get("chdir", ".")), site)))
    if shutil.which("sbatch") is None:
        raise UserError("no sbatch here; submit from a login node of the cluster, or train without Slurm: nsi train")
    said = _ask(["scontrol", "show", "partition", "--oneliner"])
    if said.returncode:
        raise UserError(explain(said.stderr, asked, [], []))
    partitions, saves = parse_partitions(said.stdout), signal_lead(asked)
    if script.name == "train.sbatch":
        stop_at(port_findings(PORT_RANGE.read_text() if PORT_RANGE.is_file() else ""))
        saves = max(saves, round(config.watch.grace_seconds))  # it stops by itself so long before its job ends
    stop_at(time_findings(asked, partitions, saves))
    more = tuple(f"--{name}={value}" for name, value in filled.items())
    return Checked(line, script.name, config, asked, more, partitions)


def _submit(job: Checked) -> None:
    """Gives it to sbatch; and, where it writes the parts of a data set, the job that makes one of them."""
    parsable = "parsable" in job.asked
    process = subprocess.Popen(
        ["sbatch", *job.line.words([*job.more, "--parsable"])],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    said = process.stdout.readline().strip()
    if not said:
        raise job.refused(process.communicate()[1])
    number = said.partition(";")[0]  # the cluster's name may follow
    print(said if parsable else "\n".join(told(job.script, number, _record(number), job.config)), flush=True)
    if job.script == "shard.sbatch" and "array" in values(job.line.options) and not job.config.merge:
        merge = _ask(["sbatch", *merging(job.line, number, str(job.config.out), [*job.more, "--parsable"])])
        if merge.returncode:
            raise UserError(f"job {number} is in the queue, its merge is not: {job.refused(merge.stderr)}")
        after = merge.stdout.strip()
        print(after if parsable else f"job {after} will merge and verify, when all parts are there", flush=True)
    _, errors = process.communicate()  # with --wait, sbatch stays until the job has ended
    sys.stderr.write(errors)
    if process.returncode:
        raise SystemExit(process.returncode)


def read_site(folder: Path, env: Mapping[str, str]) -> dict[str, str]:
    """The site's NSI_* variables, as bash understands its file: the batch scripts read it so too."""
    file = Path(env["NSI_SITE"]) if env.get("NSI_SITE") else folder / "site.sh"
    if not os.path.isfile(file):
        if env.get("NSI_SITE"):
            raise UserError(f"NSI_SITE={file}: no such file; copy slurm/site.example.sh there and edit it")
        return {name: value for name, value in env.items() if name.startswith("NSI_")}
    ask = 'source "$1" >&2 || exit 1; for name in ${!NSI_@}; do printf "%s=%s\\0" "$name" "${!name}"; done'
    # By its full path, since bash would look for a bare name along PATH.
    done = subprocess.run(
        ["bash", "-c", ask, "nsi", str(file.resolve())], env=dict(env), capture_output=True, text=True, check=False
    )
    if done.returncode:
        # Bash's own lines begin with the file's name, and the first says most.
        own = [line.split(": ", 1)[1] for line in done.stderr.splitlines() if line.startswith(f"{file.resolve()}: ")]
        raise UserError(f"{file}: bash cannot read it ({(own or [f'status {done.returncode}'])[0]}); correct it")
    return dict(item.split("=", 1) for item in done.stdout.split("\0") if "=" in item)


def stop_at(found: Iterator[Finding]) -> None:
    """Prints findings, a line each. Raises UserError with the last that is more than a warning."""
    errors: list[str] = []
    for finding in found:
        if finding.is_warning:
            print(f"nsi submit: warning: {finding.text}", file=sys.stderr)
        else:
            errors.append(finding.text)
    for text in errors[:-1]:
        print(f"nsi submit: {text}", file=sys.stderr)
    if errors:
        raise UserError(errors[-1])


def time_findings(asked: Mapping[str, str], partitions: Sequence[Partition], saves: int) -> Iterator[Finding]:
    """Whether the time is long enough for the job, and short enough for the partition."""
    places = chosen(partitions, asked)
    given = asked.get("time", "")
    limits = [each.time_limit for each in places]
    if given and (wanted := seconds(given)) and places and all(limit and limit < wanted for limit in limits):
        most = max(limit or 0 for limit in limits)
        names = " or ".join(each.name for each in places)
        yield Finding(f"--time {given}: partition {names} allows {duration(most)} at most; ask for less")
    usual = [each.usual_time for each in places]
    time = seconds(given) if given else max((each or 0 for each in usual), default=0) if all(usual) else None
    least = saves + _WORK_S
    if saves and time and time < least:
        whose = f"--time {given}" if given else f"no --time, and the partition's own is {duration(time)}"
        yield Finding(f"{whose}: the last {saves} s are for saving; give at least --time={duration(least)}")


def merging(line: Line, job: str, out: str, more: Sequence[str]) -> list[str]:
    """The words of the job that makes a data set of an array's parts; it has the same options."""
    one_a_task = {option.name for option in line.options if "%a" in option.value}  # files
    left_out = {"array", "dependency", "wait", "W", *one_a_task}
    after = [f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes"]
    return Line(line.options, line.script, (out, "--merge")).words([*more, *after], left_out)


def _record(job: str) -> dict[str, str]:
    """Slurm's record of a job; of an array that of its first task."""
    first = next(iter(_ask(["scontrol", "show", "job", "--oneliner", job]).stdout.splitlines()), "")
    return dict(re.findall(r"(\S+?)=(.*?)(?= [\w/:]+=|\s*$)", first))


def _ask(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """One of Slurm's commands. Raises UserError where it does not answer at all."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False)
    except FileNotFoundError:
        raise UserError(f"no {command[0]} here; submit from a login node of the cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} has not answered in {_ASK_S:.0f} s; try again later, or tell the site") from None
