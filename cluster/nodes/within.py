"""Work under a time limit: a shared folder whose server is gone answers nobody, not even with an error."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

from nsi.errors import UserError

Thing = TypeVar("Thing")
NO_ANSWER = "no answer within"  # how the trouble of a work begins that did not end


def within(seconds: float, works: Mapping[str, Callable[[], Thing]]) -> tuple[dict[str, Thing], dict[str, str]]:
    """Does all works at once. Returns what they gave, and in one line each what went wrong with the others.

    What does not end in time goes on in a thread that nobody waits for: the process has to leave by `os._exit`.
    """
    done: dict[str, Thing] = {}
    troubles: dict[str, str] = {}

    def do(name: str, work: Callable[[], Thing]) -> None:
        try:
            done[name] = work()
        except UserError as error:
            troubles[name] = str(error)
        except Exception as error:
            text = re.sub(r"\[/\S*:\d+\] ?", "", " ".join(str(error).split()))  # torch's lines of C++
            troubles[name] = f"{type(error).__name__}: {text}"

    threads = {
        name: threading.Thread(target=do, args=(name, work), daemon=True, name=name) for name, work in works.items()
    }
    for thread in threads.values():
        thread.start()
    end = time.monotonic() + seconds
    for thread in threads.values():
        thread.join(max(0.0, end - time.monotonic()))
    late = {name for name, thread in threads.items() if thread.is_alive()}
    results = {name: thing for name, thing in list(done.items()) if name not in late}
    return results, {
        **{name: text for name, text in list(troubles.items()) if name not in late},
        **dict.fromkeys(sorted(late), f"{NO_ANSWER} {seconds:.0f} s"),
    }
