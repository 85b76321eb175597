"""Runs of a comparison side by side, each in a process of its own with its share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

import torch

from fedimaging.compare.runs import Comparison, Result, Run, Runner
from fedimaging.errors import FedImagingError, Reason


def default_parallel() -> int:
    """Two, as one training makes poor use of a second core; one where the runs would share a GPU's memory."""
    return 1 if torch.cuda.is_available() else 2


def train_side_by_side(
    comparison: Comparison,
    folder: Path,
    runs: Sequence[Run],
    parallel: int,
    *,
    started: Callable[[Run], None],
    report: Callable[[Run, dict[str, Any]], None],
) -> Iterator[Result]:
    """Trains what does not need a federation, and stores each result in the folder.

    Args:
        parallel: how many run at a time.
        started: told of a run that starts.
        report: told of a run's progress, as a site tells it.

    Yields:
        results as they come.

    Raises:
        FedImagingError: a run failed; those beside it are stopped, and results so far stay.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // parallel)
    waiting, going = list(runs), dict[Connection, tuple[Run, SpawnProcess]]()
    try:
        while waiting or going:
            while waiting and len(going) < parallel:
                run = waiting.pop(0)
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_train, args=(comparison, folder, run, threads, there), daemon=True)
                process.start()
                there.close()
                going[here] = run, process
                started(run)
            ready = wait(list(going))
            for connection in [one for one in going if one in ready]:
                run, process = going[connection]
                try:
                    event = connection.recv()
                except EOFError:
                    process.join()
                    del going[connection]
                    yield _stored(folder, run, process.exitcode)
                    continue
                if event["stage"] == "failed":
                    raise FedImagingError(event["message"], event["reason"])
                report(run, event)
    finally:
        for _, process in going.values():
            process.terminate()
            process.join()


def _stored(folder: Path, run: Run, exitcode: int | None) -> Result:
    result = Result.read(folder, run)
    if result is None:
        raise FedImagingError(
            f"{run.title}: its process ended with exit code {exitcode} and without a result; if memory is short, "
            "run fewer at a time with --parallel 1",
            Reason.INTERNAL,
        )
    return result


def _train(comparison: Comparison, folder: Path, run: Run, threads: int, parent: Connection) -> None:
    """What the process of one run does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer; it ends this process.
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    try:
        Runner(comparison, folder, parent.send).result(run)
    except FedImagingError as error:
        parent.send({"stage": "failed", "message": str(error), "reason": error.reason})
    except BrokenPipeError:
        return  # The parent was killed: nobody waits for this run.
