"""CPU threads: whether several processes compete for the cores."""

from __future__ import annotations

CROWDED = 1.5  # busy threads per core from which computation slows down clearly


def crowded(threads: int, processes: int, cores: int, load: float) -> str:
    """A warning if there are clearly more busy threads than cores, else an empty string.

    OpenMP threads wait for each other in busy loops, so that two processes on the same cores can slow each other down
    many times over.

    Args:
        threads: OpenMP threads of each process.
        processes: processes of this run on this machine.
        cores: cores that they may use.
        load: load average of the machine before the run: threads of other programs.
    """
    busy = threads * processes + load
    if threads <= 1 or busy <= CROWDED * cores:
        return ""
    advice = max(1, int((cores - load) // processes))
    return (
        f"{threads * processes} OpenMP threads and a load of {load:.1f} from other programs share {cores} core(s) "
        f"and slow each other down; set OMP_NUM_THREADS={advice}"
    )
