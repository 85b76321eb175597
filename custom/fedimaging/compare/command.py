"""The command `compare`."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from fedimaging.commands import add_command
from fedimaging.errors import FedImagingError

if TYPE_CHECKING:
    from fedimaging.compare.runs import Comparison, Result, Run

console = Console(stderr=True)

Columns = dict[str, Callable[[dict[str, Any]], str]]
"""what is shown of a row, by the column's title"""

_EXAMPLES = """\
FedAvg and FedBN against pooling and training alone, on synthetic hospitals:
  python -m fedimaging compare jobs/chest_xray_fedavg jobs/chest_xray_fedbn --data data/demo
three seeds, settings changed for all rows:
  python -m fedimaging compare jobs/chest_xray_fedavg --data data/real --seeds 0,1,2 --set rounds=24 \\
    --set task.classes=normal,pneumonia --set task.image_size=112
strategies for which there is no job folder:
  python -m fedimaging compare jobs/hippocampus_fedavg --data data/hippocampus --strategy fedbn \\
    --strategy '{"name": "fedprox", "mu": 0.1}'
what FedAvg does at a hospital that it never saw:
  python -m fedimaging compare jobs/chest_xray_fedavg --data data/demo --leave-one-out
jobs that ran at hospitals or in POC, where nobody holds all data; the folders that were downloaded:
  python -m fedimaging compare --results results/ALONE_ID results/FEDAVG_ID results/LEAVE_ONE_OUT_ID
"""


def add_commands(subparsers: Any) -> None:
    """Registers `compare`."""
    parser = add_command(
        subparsers,
        "compare",
        "is federating as good as pooling, and better than training alone?",
        _EXAMPLES,
        "Trains each hospital's own model, a pooled model and the federated ones that are asked for, with\n"
        "the same network, optimizer steps, schedule, augmentation and seeds, and judges all of them on every\n"
        "hospital's test split. Each model is picked on validation cases. Federated rows run the job folders in\n"
        "FLARE's simulator, one after another; the others come first, --parallel of them at a time. A run that is\n"
        "done is a file, so an interrupted comparison goes on where it was.\n\n"
        "With --results nothing is trained: the table is made of what the sites of finished jobs reported, with the\n"
        "intervals that each site bootstrapped. It has no pooled row and no p-values, for neither images nor results\n"
        "of single cases left the sites.",
    )
    parser.add_argument(
        "jobs", nargs="*", type=Path, help="job folders; the first one's settings are the baselines' too"
    )
    parser.add_argument("--data", type=Path, help="data root with <site>/<dataset>/manifest.json")
    parser.add_argument(
        "--results", nargs="+", type=Path, metavar="DIR",
        help="folders of finished jobs, downloaded or of `simulate`; in place of JOB and --data",
    )  # fmt: skip
    parser.add_argument("--seeds", default="0", help="comma-separated; every row is trained with each (default: 0)")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of results and report (default: runs/compare_<dataset> or runs/compare_results)",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="change a setting of all rows, as `simulate --set` does",
    )  # fmt: skip
    parser.add_argument(
        "--strategy", action="append", default=[], metavar="NAME", dest="strategies",
        help="also run the first job with another training.strategy, a name or JSON; may be given several times",
    )  # fmt: skip
    parser.add_argument("--no-pooled", action="store_true", help="leave out the pooled model")
    parser.add_argument(
        "--leave-one-out", action="store_true",
        help="also run the first job without each hospital in turn, and judge the model there; a run for each hospital",
    )  # fmt: skip
    parser.add_argument(
        "--parallel", type=int, metavar="N",
        help="how many runs outside the simulator train at a time, each in a process of its own with its share of the "
        "cores (default: 2, and 1 where there is a GPU)",
    )  # fmt: skip
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.results:
        trained = ("jobs", "data", "changes", "strategies", "no_pooled", "leave_one_out", "parallel")
        if any(getattr(arguments, name) for name in trained) or arguments.seeds != "0":
            raise FedImagingError(
                "compare --results: finished jobs are compared as they are; leave out JOB, --data, --seeds, --set, "
                "--strategy, --no-pooled, --leave-one-out and --parallel"
            )
        return _compare_results(arguments)
    if not arguments.jobs or not arguments.data:
        raise FedImagingError("compare: name job folders and --data, or finished jobs with --results")
    if arguments.parallel is not None and arguments.parallel < 1:
        raise FedImagingError(f"--parallel {arguments.parallel}: a whole number of 1 or more")
    return _train_and_compare(arguments)


def _compare_results(arguments: argparse.Namespace) -> int:
    from fedimaging.compare.page import render_results
    from fedimaging.compare.results import analyse_results
    from fedimaging.report.html import write_files

    figures = analyse_results(arguments.results) | {"command": _command_line()}
    out = arguments.out or Path("runs") / "compare_results"
    out.mkdir(parents=True, exist_ok=True)
    page, data = write_files(out / "report.html", render_results(figures), figures, private=False)
    terminal = Console()
    terminal.print(results_table(figures, terminal.width))
    for caution in figures["cautions"]:
        console.print(caution, highlight=False, markup=False, soft_wrap=True)
    console.print(f"report: {page}\nfigures: {data}", highlight=False, soft_wrap=True)
    return 0


def _command_line() -> str:
    return "python -m fedimaging " + shlex.join(sys.argv[1:])


def _train_and_compare(arguments: argparse.Namespace) -> int:
    # Imported here: they bring torch and MONAI, and a command's help should not wait for them.
    from fedimaging.compare.analysis import analyse
    from fedimaging.compare.page import render
    from fedimaging.compare.runs import Comparison
    from fedimaging.compare.workers import default_parallel
    from fedimaging.federation.job import parse_changes
    from fedimaging.report.html import write_files

    comparison = Comparison(
        arguments.jobs,
        arguments.data,
        _seeds(arguments.seeds),
        parse_changes(arguments.changes),
        pooled=not arguments.no_pooled,
        leave_one_out=arguments.leave_one_out,
        strategies=[_strategy(text) for text in arguments.strategies],
    )
    out = arguments.out or Path("runs") / f"compare_{comparison.settings.dataset}"
    try:
        results = _results(comparison, out / "runs", arguments.parallel or default_parallel())
    except FedImagingError as error:
        raise FedImagingError(f"{error} (results so far stay in {out})", error.reason) from None
    figures = analyse(comparison, results) | {"command": _command_line()}
    page, data = write_files(out / "report.html", render(figures), figures, private=False)
    terminal = Console()
    terminal.print(table(figures, terminal.width))
    console.print(f"report: {page}\nfigures: {data}", highlight=False, soft_wrap=True)
    return 0


def _results(comparison: Comparison, folder: Path, parallel: int) -> list[Result]:
    """The results of all runs: those that are done, then those that need no federation, then the federated ones."""
    from fedimaging.compare.runs import Runner
    from fedimaging.compare.workers import train_side_by_side

    runner = Runner(comparison, folder)
    runs = sorted(comparison.runs, key=lambda run: run.kind == "federated")
    results: dict[str, Result] = {}
    with _Progress(len(runs)) as progress:

        def take(result: Result, stored: bool = False) -> None:
            results[result.run.key] = result
            progress.end(result, stored)

        todo = []
        for run in runs:
            if runner.is_done(run):
                take(runner.result(run), stored=True)
            else:
                todo.append(run)
        here = [run for run in todo if run.kind != "federated"]
        for result in train_side_by_side(
            comparison, folder, here, parallel, started=progress.start, report=progress.take
        ):
            take(result)
        for run in todo[len(here) :]:
            console.print(run.title, highlight=False, markup=False)
            take(runner.result(run))
    return [results[run.key] for run in comparison.runs]


class _Progress:
    """A line for each run that ended, and a bar for each that trains; the simulator shows its own."""

    def __init__(self, runs: int) -> None:
        self._runs, self._ended = runs, 0
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def start(self, run: Run) -> None:
        self._tasks[run.title] = self._bars.add_task(run.title, total=run.rounds)
        self._bars.start()

    def take(self, run: Run, event: dict[str, Any]) -> None:
        task = self._tasks[run.title]
        if event["stage"] == "loading":
            said = f"{run.title}: reading {event['split']} {event['done']}/{event['of']}"
            self._bars.update(task, description=said)
        elif event["stage"] == "training":
            self._bars.update(task, description=f"{run.title}: loss {event['loss']:.3f}", completed=event["round"])

    def end(self, result: Result, stored: bool) -> None:
        self._ended += 1
        if result.run.title in self._tasks:
            self._bars.remove_task(self._tasks.pop(result.run.title))
            if not self._tasks:
                self._bars.stop()
        metric = "undefined" if result.validation is None else f"{result.validation:.3f}"
        time = "done before" if stored else f"{result.seconds:.0f} s"
        line = (
            f"[{self._ended}/{self._runs}] {result.run.title}: validation {metric} after {result.picked} rounds, {time}"
        )
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def table(figures: dict[str, Any], width: int) -> Table:
    """The figures for a terminal of so many characters: by row, each hospital, the macro mean, all cases, cost.

    What does not fit is left out: all cases first, then the cost, then the hospitals. The report has all of it.
    """
    from fedimaging.report.html import duration, size

    hospitals: Columns = {s: lambda row, s=s: _cell(row["sites"][s]) for s in figures["sites"]}  # type: ignore[misc]
    macro: Columns = {"macro mean": lambda row: _cell(row["macro"])}
    whole: Columns = {"all cases": lambda row: _cell(row["all_cases"])}
    cost: Columns = {"cost": lambda row: f"{duration(row['seconds'])}\n{size(row['bytes'])}"}
    rows = {"* " * (name == figures["chosen"]) + name: row for name, row in figures["rows"].items()}
    layouts = hospitals | macro | whole | cost, hospitals | macro | cost, hospitals | macro, macro | whole | cost
    shown = _table(figures, "95 % interval", rows, layouts, width)
    shown.caption = "* chosen on validation; the report has differences with p-values, subgroups and curves"
    return shown


def results_table(figures: dict[str, Any], width: int) -> Table:
    """The figures of finished jobs for a terminal of so many characters: by row, each hospital and the macro mean.

    Where the hospitals do not fit they are left out. The report has all of it.
    """
    hospitals: Columns = {s: lambda row, s=s: _reported(row["sites"][s]) for s in figures["sites"]}  # type: ignore[misc]
    macro: Columns = {"macro mean": lambda row: _reported(row["macro"])}
    layouts = hospitals | macro, macro
    return _table(figures, "95 % interval of each hospital", figures["rows"], layouts, width)


def _table(
    figures: dict[str, Any], interval: str, rows: dict[str, dict[str, Any]], layouts: Sequence[Columns], width: int
) -> Table:
    """A line for each row, with a column for each name of what it says of the row: the first layout that fits."""
    title = f"test {figures['metric']['label']}, {interval}"
    shown = Table()
    for columns in layouts:
        shown = Table(Column("model", overflow="fold"), *columns, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name, row in rows.items():
            shown.add_row(name.replace("+", "\n+"), *(cell(row) for cell in columns.values()))
        # Measured for a terminal without bounds: rich never says that a table needs more than there is.
        if Console(width=10_000).measure(shown).maximum <= width:
            break
    return shown


def _reported(figure: dict[str, Any] | None) -> str:
    """A figure as a site reported it."""
    if figure is None:
        return "–"
    if figure["value"] is None:
        return str(figure["absent"])
    low, high = figure["ci"] or (None, None)
    return f"{figure['value']:.3f}" + (f"\n{low:.3f}–{high:.3f}" if low is not None else "")


def _cell(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "too few cases"
    low, high = figure["ci"] or (float("nan"), float("nan"))
    spread = f" ± {figure['sd']:.3f}" if figure["sd"] is not None else ""
    return f"{figure['value']:.3f}{spread}\n{low:.3f}–{high:.3f}"


def _strategy(text: str) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        return {"name": text}
    try:
        strategy: dict[str, Any] = json.loads(text)
    except json.JSONDecodeError as error:
        raise FedImagingError(f"--strategy {text}: not JSON: {error.msg}") from None
    return strategy


def _seeds(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise FedImagingError(f"--seeds {text}: write different whole numbers, such as 0,1,2")
    return [int(part) for part in parts]
