"""What sbatch's words come to: options in every form, times, ranks; and what partitions Slurm tells of."""

from __future__ import annotations

import pytest

from cluster.nodes.partitions import Kind, Partition, chosen, explain, parse_kinds, parse_partitions
from cluster.nodes.sbatch import (
    most_ranks,
    node_range,
    parse_options,
    script_options,
    seconds,
    signal_lead,
    split_line,
    values,
    variable_options,
)
from nsi.errors import UsageError

PARTITIONS = [Partition("main", True, 4, None, 1800), Partition("low", False, 2, 600, 600)]
KINDS = [Kind("main", 3, 8, 16000, 2), Kind("main", 1, 64, 9000, 0), Kind("low", 2, 8, 16000, 0)]


@pytest.mark.parametrize(
    "words",
    [
        ["--partition=low", "--nodes=2", "--time=10"],
        ["--partition", "low", "--nodes", "2", "--time", "10"],
        ["-p", "low", "-N", "2", "-t", "10"],
        ["-plow", "-N2", "-t10"],
        ["-Hp", "low", "-QHN2", "-Wt", "10"],
    ],
    ids=" ".join,
)
def test_an_option_may_be_written_in_many_ways(words: list[str]) -> None:
    found = values(parse_options(words))
    assert {name: found.get(name) for name in ("partition", "nodes", "time")} == {
        "partition": "low",
        "nodes": "2",
        "time": "10",
    }


def test_a_line_is_options_a_script_and_its_arguments() -> None:
    words = ["--exclusive", "--mem", "4G", "-w", "n1", "-N", "2", "slurm/train.sbatch", "--data_path", "x.sbatch", "-p"]
    line = split_line(words)
    assert line.script == "slurm/train.sbatch"
    assert line.arguments == ("--data_path", "x.sbatch", "-p")
    assert line.words() == words
    assert line.words(["--account=a"])[0] == "--account=a"
    assert line.words(without=["nodes"]) == [word for word in words if word not in ("-N", "2")]


@pytest.mark.parametrize("words", [[], ["-N2"], ["--wrap", "hostname"], ["--output=a.sbatch"]], ids=" ".join)
def test_a_line_without_a_script_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match=r"no script that ends in \.sbatch"):
        split_line(words)


def test_the_scripts_lines_are_the_weakest_and_the_persons_the_strongest() -> None:
    text = "#!/bin/bash\n#SBATCH --partition=a --time=1 # first\n\n# more\n#SBATCH -q 'a b'\n:\n#SBATCH --nodes=9\n"
    env = {"SBATCH_TIMELIMIT": "2", "SBATCH_PARTITION": "b", "PATH": "x"}
    found = values(script_options(text), variable_options(env), parse_options(["-p", "c"]))
    assert found == {"partition": "c", "time": "2", "qos": "a b"}


def test_an_open_quotation_mark_in_a_script_is_left_to_sbatch() -> None:
    assert script_options("#SBATCH --comment='x\n#SBATCH -N 2\n")[0].name == "nodes"


@pytest.mark.parametrize(
    ("options", "ranks"),
    [
        ("", 1),
        ("--nodes=2", 2),
        ("--nodes=2-4", 4),
        ("--ntasks=6", 6),
        ("--nodes=2 --ntasks-per-node=3", 6),
        ("--nodes=2 --gpus-per-node=4", 8),
        ("--nodes=2 --gpus-per-node=a100:4 --ntasks-per-node=1", 8),
        ("--nodes=3 --gres=gpu:2", 6),
        ("--nodes=3 --gres=disk:1,gpu:a100:2", 6),
        ("--nodes=3 --gres=gpu", 3),
        ("-G a100:4,v100:2", 6),
        ("--ntasks=4 --gpus-per-task=2", 8),
        ("--nodes=all", 1),
    ],
)
def test_ranks_are_counted_as_the_script_does(options: str, ranks: int) -> None:
    assert most_ranks(values(parse_options(options.split()))) == ranks


def test_a_range_of_nodes_has_two_ends() -> None:
    assert node_range({"nodes": "2-4"}) == (2, 4)
    assert node_range({"nodes": "3"}) == (3, 3)
    assert node_range({}) == node_range({"nodes": "many"}) == (0, 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400),
        ("1:30", 90),
        ("1:30:00", 5400),
        ("1-12", 129_600),
        ("1-12:30", 131_400),
        ("2-00:00:30", 172_830),
        ("0", None),
        ("UNLIMITED", None),
        ("soon", None),
        ("", None),
    ],
)
def test_a_time_is_read_as_slurm_does(text: str, expected: int | None) -> None:
    assert seconds(text) == expected


def test_a_signal_comes_so_long_before_the_end() -> None:
    assert signal_lead({"signal": "B:USR1@120"}) == 120
    assert signal_lead({"signal": "USR1"}) == 60
    assert signal_lead({}) == 0


def test_partitions_and_nodes_are_read() -> None:
    said = (
        "PartitionName=main Default=YES DefaultTime=00:30:00 MaxTime=UNLIMITED TotalNodes=4 TRES=cpu=32,mem=9G\n"
        "PartitionName=low Default=NO DefaultTime=NONE MaxTime=00:10:00 State=UP TotalNodes=2\n\n"
    )
    assert parse_partitions(said) == PARTITIONS
    said = "main|3|8|16000|gpu:a100:2(S:0-1)\nmain|1|64+|9000+|(null)\nlow|2|8|16000|\n"
    assert parse_kinds(said) == KINDS
    assert parse_kinds("a|1|8|1|gpu:2,gpu:v100:4")[0].gpus == 6


def test_a_job_runs_in_the_partitions_it_names_or_in_the_default() -> None:
    assert chosen(PARTITIONS, {}) == PARTITIONS[:1]
    assert chosen(PARTITIONS, {"partition": "low,main"}) == PARTITIONS
    assert chosen(PARTITIONS, {"partition": "other"}) == []


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "sbatch: error: Batch job submission failed: Invalid partition name specified",
            "no partition 'x' here; there are main (the default), low: give one of them as --partition",
        ),
        (
            "sbatch: error: Batch job submission failed: No partition specified or system default partition",
            "this cluster has no default partition; there are main (the default), low: give one of them as --partition",
        ),
        (
            "sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified",
            "Invalid account or account/partition combination specified; `sacctmgr show associations user=$USER "
            "format=account,partition,qos` lists what you may use",
        ),
        (
            "allocation failure: Requested time limit is invalid (missing or exceeds some limit)",
            "--time 9: Requested time limit is invalid (missing or exceeds some limit); `sinfo -o '%R %l'` lists the "
            "partitions' limits",
        ),
        (
            "sbatch: error: fetch_config: DNS SRV lookup failed\n"
            "sbatch: fatal: Could not establish a configuration source",
            "Slurm is not set up on this machine (Could not establish a configuration source); submit from a login "
            "node of the cluster",
        ),
        ("sbatch: error: out of cheese\n", "out of cheese (so says sbatch; `sbatch --help` lists its options)"),
        ("", "no word (so says sbatch; `sbatch --help` lists its options)"),
    ],
    ids=["partition", "default", "account", "time", "configuration", "other", "nothing"],
)
def test_what_sbatch_says_becomes_one_line(said: str, told: str) -> None:
    assert explain(said, {"partition": "x", "time": "9"}, PARTITIONS, KINDS) == told


def test_of_too_large_a_job_it_tells_what_there_is() -> None:
    said = "allocation failure: Requested node configuration is not available"
    told = explain(said, {"partition": "low,main"}, PARTITIONS, KINDS)
    assert "main has 4 nodes with at most 64 CPUs, 16000 MB and 2 GPUs each; low has 2 nodes with at most 8" in told
    assert "`sinfo -o '%R %D %c %m %G'` lists what there is" in explain(said, {}, [], [])
