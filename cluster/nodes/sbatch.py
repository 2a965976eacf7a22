"""What a person asks of Slurm: the words of an sbatch command line, and what they come to. Nothing is run here.

Options come from three places, of which a later one wins: the script's #SBATCH lines, SBATCH_* variables, the line.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nsi.errors import UsageError

SUFFIX = ".sbatch"
_LONG = {
    "A": "account",
    "C": "constraint",
    "D": "chdir",
    "G": "gpus",
    "J": "job-name",
    "M": "clusters",
    "N": "nodes",
    "a": "array",
    "d": "dependency",
    "e": "error",
    "n": "ntasks",
    "o": "output",
    "p": "partition",
    "q": "qos",
    "t": "time",
}
_SWITCHES = "HIOQVWhksuv"  # the short options that stand alone; all others take a value
_VALUED = {*_LONG.values(), "gres", "gpus-per-node", "gpus-per-task", "ntasks-per-node", "signal"}
_VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_ARRAY_INX": "array",
    "SBATCH_CLUSTERS": "clusters",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_GPUS": "gpus",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task",
    "SBATCH_GRES": "gres",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_SIGNAL": "signal",
    "SBATCH_TIMELIMIT": "time",
}


class Option(NamedTuple):
    """One option: its long name, its value, and the words that gave it."""

    name: str
    value: str
    words: tuple[str, ...]


@dataclass(frozen=True)
class Line:
    """What stands behind the word sbatch."""

    options: tuple[Option, ...]
    script: str
    arguments: tuple[str, ...]

    def words(self, more: Iterable[str] = (), without: Iterable[str] = ()) -> list[str]:
        """The line again. `more` comes first, so that the person's own options win; `without` leaves some out."""
        left_out = set(without)
        kept = [word for option in self.options if option.name not in left_out for word in option.words]
        return [*more, *kept, self.script, *self.arguments]


def split_line(words: Sequence[str]) -> Line:
    """The parts of a line. Raises UsageError where it names no script."""
    place = next((place for place, word in enumerate(words) if word.endswith(SUFFIX) and word[:1] != "-"), None)
    if place is None:
        raise UsageError(
            f"no script that ends in {SUFFIX}; as in: nsi submit -N 2 slurm/train.sbatch --data_path S --log_path R"
        )
    return Line(parse_options(words[:place]), words[place], tuple(words[place + 1 :]))


def parse_options(words: Sequence[str]) -> tuple[Option, ...]:
    """Options one by one. Of one that is unknown here only the name is taken; its value is an option without a name."""
    options: list[Option] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            name, value = _short(word)
            equals = value or name not in _VALUED
        if not equals and name in _VALUED and rest:
            value = rest.pop(0)
            options.append(Option(name, value, (word, value)))
        else:
            options.append(Option(name, value, (word,)))
    return tuple(options)


def _short(word: str) -> tuple[str, str]:
    """`-N2` is nodes and 2; `-HN2` too."""
    if not word.startswith("-"):
        return "", word
    letters = word[1:].lstrip(_SWITCHES)
    return (_LONG.get(letters[:1], letters[:1]), letters[1:]) if letters else (word[1:], "")


def script_options(text: str) -> tuple[Option, ...]:
    """Those of the #SBATCH lines, which end with the first command."""
    words: list[str] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if line.startswith("#SBATCH"):
            try:
                words += shlex.split(line.removeprefix("#SBATCH"), comments=True)
            except ValueError:  # an open quotation mark is sbatch's to tell
                continue
    return parse_options(words)


def variable_options(env: Mapping[str, str]) -> tuple[Option, ...]:
    """Those of SBATCH_* variables."""
    return tuple(Option(name, env[variable], ()) for variable, name in _VARIABLES.items() if variable in env)


def values(*places: Iterable[Option]) -> dict[str, str]:
    """What holds, by name, where options come from several places, the strongest last."""
    return {option.name: option.value for place in places for option in place if option.name}


def node_range(asked: Mapping[str, str]) -> tuple[int, int]:
    """The fewest and the most nodes; zeros where the options do not tell."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", asked.get("nodes", ""))
    return (int(found[1]), int(found[2] or found[1])) if found else (0, 0)


def gpus_a_node(asked: Mapping[str, str]) -> int:
    """0 where none are asked for, or not by the node."""
    if "gpus-per-node" in asked:
        return _count(asked["gpus-per-node"].split(","))
    return _count(item.partition(":")[2] for item in asked.get("gres", "").split(",") if item.startswith("gpu"))


def most_ranks(asked: Mapping[str, str]) -> int:
    """How many processes slurm/train.sbatch starts on the most nodes: one a GPU, else one a task, else one a node."""
    nodes = node_range(asked)[1] or 1
    tasks = _number(asked.get("ntasks")) or nodes * (_number(asked.get("ntasks-per-node")) or 1)
    if a_node := gpus_a_node(asked):
        return nodes * a_node
    if "gpus" in asked:
        return _count(asked["gpus"].split(","))
    return tasks * (_count(asked["gpus-per-task"].split(",")) if "gpus-per-task" in asked else 1)


def _count(items: Iterable[str]) -> int:
    """Of `4`, of `a100:4`, of both."""
    return sum(_number(item.rpartition(":")[2]) or 1 for item in items)


def _number(text: str | None) -> int:
    return int(text) if text and text.isdecimal() else 0


def seconds(text: str) -> int | None:
    """A Slurm time in seconds: `90` (minutes), `1:30:00`, `1-12`. None for no limit (`0`) and for what is no time."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not found:
        return None
    first, second, third = (int(found[place] or 0) for place in (2, 3, 4))
    if found[1] is not None:
        first += int(found[1]) * 24
    elif found[4] is None:
        first, second, third = 0, first, second
    return first * 3600 + second * 60 + third or None


def signal_lead(asked: Mapping[str, str]) -> int:
    """How many seconds before its end the job's script hears a signal; 0 where it hears none."""
    signal, _, lead = asked.get("signal", "").partition("@")
    return (_number(lead) or 60) if signal else 0
