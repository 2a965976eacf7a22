"""The words of `nsi submit`: its help, and what it says of a job that is in the queue."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HELP = """\
usage: nsi submit [SLURM OPTIONS] SCRIPT ARGS

Submits a job as sbatch does, with the same words: what you would give to sbatch, give to nsi submit.

  nsi submit --nodes=2 --gpus-per-node=8 --time=12:00:00 slurm/train.sbatch --data_path SHARDS --log_path RUN
  nsi submit --array=1-8 --cpus-per-task=8 slurm/shard.sbatch SOURCE SHARDS      and the merge, when all parts are there
  nsi submit --array=1-8 --gpus-per-node=1 slurm/features.sbatch SHARDS STORE
  nsi submit --gpus-per-node=1 slurm/eval.sbatch RUN --split test
  nsi submit --time=1-0 slurm/monitor.sbatch RUN
  nsi submit slurm/train.sbatch --help                                           the script's own arguments

Before it asks sbatch it
  fills in --account, --partition, --qos and --constraint from the file NSI_SITE, or from site.sh beside the script,
    where neither you nor an SBATCH_* variable gave them (slurm/site.example.sh is the file to copy);
  checks ARGS: flags, shards, the run folder, the batch against the ranks, and folders that only one node would see;
  checks --time against what is needed for saving and against the partition's limit;
  lets `sbatch --test-only` say whether such nodes exist, and says in one line what to change where they do not.
Then it prints the job's number, where its output will be, and what to type next. --parsable prints the number alone.
Exit status: 0 submitted, 1 refused, 2 wrong usage; with --wait that of the job.
"""


def duration(seconds: int) -> str:
    """As Slurm writes times."""
    days, rest = divmod(seconds, 86_400)
    text = f"{rest // 3600}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{text}" if days else text


def told(script: str, job: str, record: Mapping[str, str], config: Any) -> Iterator[str]:
    """What a person wants to know of a job just submitted. `record`: Slurm's; `config`: the script's verb's."""
    # Of an array that waits Slurm has one record, with a number that no task has.
    output = record.get("StdOut", "").replace("4294967294", "*")
    yield f"job {job} is in the queue of {record.get('Partition', 'Slurm')}"
    yield _line("output", output)
    if script == "train.sbatch":
        yield _line("ranks", f"{record.get('WorkDir', '.')}/logs/{job}-RANK.log")
    yield _line("look", f"squeue --job={job}")
    if script == "train.sbatch":
        yield _line("", f"tail -F {record.get('WorkDir', '.')}/logs/{job}-0.log")
        yield _line("stop", f"scancel --batch --signal=USR1 {job}   saves, and goes on later")
        yield _line("", f"scancel {job}   saves if there is time, and ends")
    else:
        yield _line("", f"tail -F {output}")
        yield _line("stop", f"scancel {job}")
    if following := _next(script, config):
        yield _line("next", following)


def _next(script: str, config: Any) -> str:
    """What comes after this job."""
    if script == "train.sbatch":
        run = config.log_path
        return f"nsi submit slurm/monitor.sbatch {run}; when it is done: nsi submit slurm/eval.sbatch {run}"
    if script == "shard.sbatch":
        return f"nsi submit slurm/train.sbatch --data_path {config.out} --log_path RUN"
    if script == "features.sbatch":
        return f"nsi submit slurm/train.sbatch --data_path {config.shards} --features {config.out} --log_path RUN"
    return f"{config.run}/report.html" if script == "eval.sbatch" else ""


def _line(name: str, text: str) -> str:
    return f"  {name:8}{text}"
