"""Run functions and commands in new processes that start with torch and racnn imported.

Importing them takes longer than most of what the tests run. The processes are forked from one that has done nothing
but import, so they are as separate as any others: they can be killed, get signals and write to files of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command import CommandResult

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "pytest",
        "onnxruntime",
        "torch.distributed.launcher.api",
        "torch.distributed.elastic.agent.server.local_elastic_agent",
        "racnn_cli.api",
        "racnn_cli.cli",
        "racnn_cli.data.transforms",
        "racnn_cli.evaluation",
        "racnn_cli.results.predict",
        "racnn_cli.results.report",
        "racnn_cli.training.stages",
    ]
)


class Started:
    """A process under way; its output goes to files."""

    def __init__(self, function: Callable[..., object], arguments: Any, folder: Path, out: str) -> None:
        self._output = Path(tempfile.mkdtemp(dir=folder, prefix=".output-"))
        self._process = _CONTEXT.Process(target=_call, args=(function, arguments, folder, self._output, out))
        self._process.start()

    def wait(self, timeout: float = 300) -> CommandResult:
        """Its exit code (negative: the signal that ended it) and output.

        Raises:
            TimeoutError: it is still running after `timeout` seconds; it is killed.
        """
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self._text('err')}")
        return CommandResult(code, self._text("out"), self._text("err"))

    def _text(self, name: str) -> str:
        return (self._output / name).read_text(encoding="utf-8", errors="surrogateescape")


def start(function: Callable[..., object], *arguments: Any, folder: Path, out: str = "") -> Started:
    """Start a function of a module in a new process.

    Args:
        function, arguments: to be called.
        folder: the current folder of the process.
        out: file or device for its output; empty: a file whose text `Started.wait` returns.
    """
    return Started(function, arguments, folder, out)


def run_racnn(*arguments: object, folder: Path) -> CommandResult:
    """Run the command `racnn` with arguments in a new process."""
    return start(call_racnn, *map(str, arguments), folder=folder).wait()


def call_racnn(*arguments: str) -> None:
    """The command `racnn` with arguments, in this process."""
    from racnn_cli.cli import main

    sys.argv = ["racnn", *arguments]
    main()


def launch(
    processes: int,
    function: Callable[..., object],
    *arguments: Any,
    folder: Path,
    restarts: int = 0,
    nodes: int = 1,
    endpoint: str = "",
) -> Started:
    """Start torchrun's engine with a function instead of a program, as a launcher on one machine does.

    Args:
        processes: started by this launcher.
        function, arguments, folder: as in `start`, for each process.
        restarts: how often all processes are started again after one has died.
        nodes: number of launchers that start processes together.
        endpoint: `host:port` where several launchers meet.
    """
    return start(_elastic, processes, nodes, endpoint, restarts, function, arguments, folder=folder)


def _elastic(
    processes: int, nodes: int, endpoint: str, restarts: int, function: Callable[..., object], arguments: Any
) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id="7",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint or "localhost:0",
        max_restarts=restarts,
        start_method="fork",
    )
    elastic_launch(config, function)(*arguments)


def _call(function: Callable[..., object], arguments: Any, folder: Path, output: Path, out: str) -> None:
    os.chdir(folder)
    for path, number in ((output / "out", 1), (output / "err", 2)):
        path.touch()
        os.dup2(os.open(out if out and number == 1 else path, os.O_WRONLY | os.O_NOCTTY), number)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    function(*arguments)
