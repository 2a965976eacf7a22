"""The command line: `nsi VERB ...`, the same as `python -m launch VERB ...`.

Each verb is a file of this folder with a frozen configuration and `run(config)`. A verb's file is imported when it is
called for, so that `nsi synth` does not wait for torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from nsi.errors import UsageError, UserError

VERBS = {
    "synth": ("launch.synth", "SynthConfig", "render textured scenes in the CLEVRTex layout"),
    "shard": ("launch.shard", "ShardConfig", "turn CLEVRTex, in any form, into WebDataset shards"),
    "verify": ("launch.verify", "VerifyConfig", "check every byte of a folder of shards"),
    "plan": ("launch.plan", "PlanConfig", "what a run over these shards will need, before paying for it"),
    "doctor": ("launch.doctor", "DoctorConfig", "check the nodes of a job, or this machine, before it begins"),
    "submit": ("launch.submit", "", "give a job to Slurm as sbatch does, checked, with the site's settings"),
    "features": ("launch.features", "FeaturesConfig", "store the backbone's features, so that training skips it"),
    "train": ("launch.train", "", "train on shards, alone or under any launcher"),
    "eval": ("launch.evaluate", "EvalConfig", "measure retrieval and object discovery of a run"),
    "export": ("launch.export", "ExportConfig", "write a run's model so that it loads without DeepSpeed"),
    "import-reference": ("launch.import_reference", "ImportConfig", "make a run of the public code's trained model"),
    "audit": ("launch.audit", "AuditConfig", "prove from its ledger what a run has read"),
    "report": ("launch.report", "ReportConfig", "write a run's report as one HTML file"),
    "bench": ("launch.bench", "BenchConfig", "measure a part against what one would use otherwise"),
    "demo": ("launch.demo", "DemoConfig", "all of it in minutes, on two CPU processes"),
}
DEBUG = "--debug"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one verb; the process ends with 0 for done, 1 for a failure told in one line, 2 for wrong usage."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    status = run(given)
    if given[:1] in (["train"], ["doctor"]):
        # A failed rank leaves gloo's threads running, and these abort Python's own way out now and then (pytorch issue
        # 190489): the status would be SIGABRT's. The doctor may leave threads behind that no folder answers. All files
        # are closed by now.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Runs one verb and returns the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        print(f"nsi: no verb {verb!r}; there are {', '.join(VERBS)}", file=sys.stderr)
        return 2
    debug = DEBUG in arguments
    rest = [argument for argument in arguments[1:] if argument != DEBUG]
    try:
        module = importlib.import_module(VERBS[verb][0])
        if hasattr(module, "main"):  # a verb with a command line of its own
            module.main(rest)
        else:
            module.run(_parse(module, verb, rest))
    except SystemExit as leaving:  # tyro ends so after --help (0) and after wrong usage (2)
        return leaving.code if isinstance(leaving.code, int) else 2
    except KeyboardInterrupt:
        print(f"nsi {verb}: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output went away (`nsi verify ... | head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except UserError as error:
        if debug:
            raise
        print(f"nsi {verb}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except Exception as error:
        if debug:
            raise
        print(f"nsi {verb}: {_in_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def _in_one_line(error: Exception) -> str:
    """An unforeseen failure; a lost connection to another rank is only the echo of that rank's own failure."""
    text = str(error)
    if type(error).__name__ == "DistBackendError" or "gloo/transport" in text:
        return "another rank ended; its own line says why"
    return f"{type(error).__name__}: {' '.join(text.split())} (--debug shows where)"


def _parse(module: Any, verb: str, arguments: list[str]) -> Any:
    import tyro

    kind = getattr(module, VERBS[verb][1])
    return tyro.cli(kind, args=arguments, prog=f"nsi {verb}", use_underscores=True)


def _overview() -> str:
    lines = ["usage: nsi VERB ...      (nsi VERB --help tells more)", ""]
    lines += [f"  {verb:16} {text}" for verb, (_, _, text) in VERBS.items()]
    lines += ["", f"{DEBUG} anywhere shows the traceback of a failure. Exit status: 0 done, 1 failed, 2 wrong usage."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
