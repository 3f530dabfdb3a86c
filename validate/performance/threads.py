"""Whether a runtime uses the threads that it was told to use, and the CPUs that there are."""

from __future__ import annotations

import os

from ...environment import available_cores, available_cpus
from ..records.report import Check
from .latency import SubjectRun


def check_threads(result: SubjectRun) -> Check | None:
    """The number of threads as read back from the runtime, against what it was told and against the CPUs here; `None`
    where a runtime has no such number (a GPU's).

    One thread a core is enough where two CPUs share a core: OpenVINO takes no more when it is to be quick.
    """
    told = result.properties.get("threads", "")
    if not told.isdecimal():
        return None
    used, asked, available = int(told), result.settings.threads_used, available_cpus()
    chosen = "asked for" if result.settings.threads else "told, one for each CPU available"
    found = f"the runtime says {_counted(used, 'thread')} and {asked} {'was' if asked == 1 else 'were'} {chosen}"
    busy = f"{result.busy_cpus:.2f} CPUs were busy while it was timed"
    if used > available:
        cause = f"{used} threads take turns on {_counted(available, 'CPU')}: ask for {available}"
    elif used >= asked or (asked <= available and used >= available_cores()):
        return Check(name="threads", passed=True, detail=f"{found}; {busy}")
    else:
        cause = _why_fewer(asked, available, result)
    return Check(name="threads", passed=False, detail=f"{found}: {cause}; {busy}")


def _why_fewer(asked: int, available: int, result: SubjectRun) -> str:
    if os.environ.get("ORT_LOAD_CONFIG_FROM_MODEL") == "1" and result.properties["runtime"].startswith("onnxruntime"):
        return "the graph sets it, which ORT_LOAD_CONFIG_FROM_MODEL=1 in the environment lets it"
    if asked > available:
        limited = f" of the machine's {os.cpu_count()}" if available < (os.cpu_count() or available) else ""
        return f"only {_counted(available, 'CPU')}{limited} may be used by this process"
    return "a setting in the program or its backend overrules what it was told"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
