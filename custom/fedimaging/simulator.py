"""`python -m fedimaging workspace` and `simulate`: a federation of several sites on one machine."""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedimaging.commands import add_command, print_error
from fedimaging.datasets.manifest import SPLITS
from fedimaging.datasets.site import DATA_ROOT_VARIABLE, MANIFEST_FILE, SITE_FILE, Dataset, resolve
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.policy import write_policies
from fedimaging.federation.protocol import PROGRESS_FILE, ROUNDS_FILE, SIMULATED_JOB_ID, START_MODELS_FILE
from fedimaging.governance.grants import grant_everything

console = Console(stderr=True)

_POLL_SECONDS = 0.2
_MARK = ".simulator-workspace"


def find_sites(data: Path, dataset: str | None = None) -> dict[str, list[str]]:
    """The sites of a data root with the datasets that each holds: ``<root>/<site>/<dataset>/manifest.json``."""
    sites: dict[str, list[str]] = {}
    for manifest in sorted(data.glob(f"*/{dataset or '*'}/{MANIFEST_FILE}")):
        sites.setdefault(manifest.parts[-3], []).append(manifest.parts[-2])
    if not sites:
        raise FedImagingError(
            f"{data}: no <site>/{dataset or '<dataset>'}/{MANIFEST_FILE} below this folder; make one with "
            "`python -m fedimaging data synth` or `data index`",
            Reason.NO_DATASET,
        )
    return sites


def make_workspace(folder: Path, data: Path, start_models: dict[str, Path] | None = None) -> list[str]:
    """Makes a simulator workspace with the sites' policies, dataset file and grants. Returns the names of the sites.

    FLARE's simulator keeps ``local/`` of a workspace and deletes the rest, so a folder that is not a workspace is
    refused.
    """
    sites = find_sites(data)
    if folder.exists() and any(folder.iterdir()) and not (folder / "local" / _MARK).exists():
        raise FedImagingError(
            f"{folder}: not empty and not a simulator workspace, which a run would delete; name another"
        )
    local = folder / "local"
    local.mkdir(parents=True, exist_ok=True)
    (local / _MARK).touch()
    write_policies(local)
    datasets = sorted({name for names in sites.values() for name in names})
    entries = {name: {"path": f"{data.resolve()}/{{site}}/{name}"} for name in datasets}
    (local / SITE_FILE).write_text(yaml.safe_dump(entries))
    grant_everything(local, datasets)
    (local / START_MODELS_FILE).unlink(missing_ok=True)
    if start_models:
        names = {job: {"file": str(path.resolve()), "submitter": None} for job, path in start_models.items()}
        (local / START_MODELS_FILE).write_text(yaml.safe_dump(names))
    return list(sites)


def simulator_command(job: Path, workspace: Path, sites: list[str]) -> list[str]:
    """The plain FLARE command that runs a job folder; one thread a site, so that no process is started twice."""
    return ["simulator", str(job), "-w", str(workspace), "-c", ",".join(sites), "-t", str(len(sites))]


@dataclass
class Outcome:
    """How a simulation ended, judged by what it produced."""

    sites: list[str]
    errors: list[str] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    key_metric: str = ""
    seconds: float = 0.0


def simulate(
    job_path: Path,
    data: Path,
    workspace: Path,
    *,
    changes: dict[str, Any] | None = None,
    sites: list[str] | None = None,
    start_from: Path | None = None,
    verbose: bool = False,
    command: str = "",
) -> Outcome:
    """Runs a job folder in FLARE's simulator over the sites of a data root and judges the run by its results.

    Raises:
        FedImagingError: before anything starts, if the job, a setting or a site's dataset is wrong.
    """
    # Imported here: it brings torch and MONAI, and a command's help should not wait for them.
    from fedimaging.federation.job import JobFolder

    job = JobFolder(job_path)
    job.override(changes or {})
    settings = job.settings()
    found = list(find_sites(data, settings.dataset))
    chosen = sites or found
    if absent := sorted(set(chosen) - set(found)):
        raise FedImagingError(
            f"{data}: no site {absent[0]} with the dataset {settings.dataset}; here: {', '.join(found)}"
        )
    if job.leave_out and job.leave_out not in chosen:
        raise FedImagingError(f"leave_out: no site {job.leave_out} takes part; name one of {', '.join(chosen)}")
    trained = [site for site in chosen if site != job.leave_out]
    if len(trained) < job.min_clients:
        raise FedImagingError(
            f"{data}: {len(trained)} sites to train at, and the job needs {job.min_clients}; add sites or --set "
            "min_clients=1"
        )
    if start_from is not None and job.leave_out:
        raise FedImagingError(
            f"--start-from: nobody can tell whether {job.leave_out}, which leave_out names, had a part in that model; "
            "drop one of the two"
        )
    if start_from is not None and not start_from.is_file():
        raise FedImagingError(f"{start_from}: no such model file; name an FL_global_model.pt of an earlier run")
    make_workspace(workspace, data, {job.name: start_from} if start_from else None)
    with _environment_without_data_root():
        console.print(_dataset_table(_check_sites(settings, chosen, workspace / "local")))
    _clear_results(workspace)
    outcome = Outcome(chosen)
    started = time.monotonic()
    log = workspace.with_name(workspace.name + ".log")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / job.name
        job.write(copy)
        with _flare(simulator_command(copy, workspace, chosen), len(chosen), log, verbose) as process:
            _follow(process, workspace, job.rounds, outcome)
    outcome.seconds = round(time.monotonic() - started, 2)
    _judge(outcome, workspace, job.rounds, job.min_clients, trained)
    record = {
        "job": job.name,
        "sites": chosen,
        "overrides": changes or {},
        "command": command,
        "seconds": outcome.seconds,
        "data": str(data.resolve()),
        "ok": not outcome.errors,
        "errors": outcome.errors,
    }
    (workspace / "simulate.json").write_text(json.dumps(record, indent=2) + "\n")
    if outcome.errors:
        outcome.errors.append(f"the full log is {log}")
    return outcome


def _clear_results(workspace: Path) -> None:
    """Deletes what an earlier run left, as FLARE will: this run must not be judged by it."""
    for path in workspace.iterdir():
        if path.name != "local":
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_sites(settings: Any, sites: list[str], local: Path) -> list[Dataset]:
    datasets = []
    for site in sites:
        dataset = resolve(settings.dataset, site, local)
        settings.task.check(dataset.manifest, str(dataset.manifest_path))
        datasets.append(dataset)
    return datasets


def _dataset_table(datasets: list[Dataset]) -> Table:
    table = Table("site", "dataset", *(f"{split} cases" for split in SPLITS), title="Who takes part")
    for dataset in datasets:
        counts = [str(len(dataset.manifest.split(split))) for split in SPLITS]
        table.add_row(dataset.site, dataset.name, *counts)
    return table


@contextlib.contextmanager
def _environment_without_data_root() -> Iterator[None]:
    """The data root was said on the command line; the environment's must not win over it."""
    saved = os.environ.pop(DATA_ROOT_VARIABLE, None)
    try:
        yield
    finally:
        if saved is not None:
            os.environ[DATA_ROOT_VARIABLE] = saved


@contextlib.contextmanager
def _flare(arguments: list[str], sites: int, log: Path, verbose: bool) -> Iterator[subprocess.Popen[bytes]]:
    """FLARE's simulator as a child process; however this block ends, none of its processes is left."""
    environment = {name: value for name, value in os.environ.items() if name != DATA_ROOT_VARIABLE}
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // sites)))
    with log.open("wb") as file:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", "nvflare.cli", *arguments],
            stdout=None if verbose else file,
            stderr=None if verbose else subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        # A closed terminal or a stopped container ends the run as Ctrl-C does.
        previous = {s: signal.signal(s, signal.default_int_handler) for s in (signal.SIGTERM, signal.SIGHUP)}
        try:
            yield process
        finally:
            stop_process_tree(process.pid)
            process.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)


def stop_process_tree(pid: int, grace: float = 3.0) -> None:
    """Ends a process and all its descendants: asked first, then killed."""
    try:
        root = psutil.Process(pid)
        family = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(process)
        _, family = psutil.wait_procs(family, timeout=grace)
        if not family:
            return


class Tail:
    """Lines of JSON that are appended to a file while it is read."""

    def __init__(self, path: Path) -> None:
        self.path, self._position = path, 0

    def read(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._position)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._position += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def _follow(process: subprocess.Popen[bytes], workspace: Path, rounds: int, outcome: Outcome) -> None:
    """Shows rounds, sites and the key metric as they come, until the simulator ends."""
    server = Tail(workspace / "server" / SIMULATED_JOB_ID / ROUNDS_FILE)
    sites = {name: Tail(workspace / name / SIMULATED_JOB_ID / PROGRESS_FILE) for name in outcome.sites}
    doing = dict.fromkeys(outcome.sites, "starting")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("starting the server and the sites", total=rounds)
        ended = False
        while not ended:
            ended = process.poll() is not None
            for event in server.read():
                show_event(event, outcome)
                progress.update(bar, completed=len(outcome.rounds))
            for name, tail in sites.items():
                for event in tail.read():
                    doing[name] = _say(event)
                    if event["stage"] == "refused":
                        outcome.errors.append(f"site {name} refused ({event['reason']}): {event['message']}")
            if any(what != "starting" for what in doing.values()):
                progress.update(bar, description="  ".join(f"{site}: {what}" for site, what in doing.items()))
            if not ended:
                time.sleep(_POLL_SECONDS)


def show_event(event: dict[str, Any], outcome: Outcome) -> None:
    """Shows an event of the server: a line per round, a star on the best model so far, why a job ended early."""
    if event["event"] == "start":
        outcome.key_metric = event["key_metric"]
        names = [f"{site} (left out)" if site == event.get("leave_out") else site for site in outcome.sites]
        console.print(
            f"{'round':>5}  {'validation ' + outcome.key_metric:>18}   training loss: {', '.join(names)}",
            highlight=False,
        )
    elif event["event"] == "round":
        outcome.rounds.append(event)
        losses = "  ".join(
            f"{event['sites'][site]['loss']:.3f}" if site in event["sites"] else "  -  " for site in outcome.sites
        )
        console.print(
            f"{event['round']:>5}  {_metric(event):>18}   {losses}   {event['seconds']:.1f} s",
            highlight=False,
        )
    elif event["event"] == "final":
        console.print(f"{'last':>5}  {_metric(event):>18}", highlight=False)
    elif event["event"] == "failed":
        console.print(f"{event['round']:>5}  the job ends: {event['reason']}", highlight=False, markup=False)
    elif event["event"] == "end":
        outcome.end = event


def _metric(event: dict[str, Any]) -> str:
    value = "undefined" if event["key_metric"] is None else f"{event['key_metric']:.3f}"
    return f"{value} {'*' if event['best'] else ' '}"


def _say(event: dict[str, Any]) -> str:
    match event["stage"]:
        case "loading":
            return f"reading {event['split']} {event['done']}/{event['of']}"
        case "validated":
            return f"round {event['round']} validated"
        case "training":
            return f"round {event['round']} loss {event['loss']:.3f}"
        case "evaluated":
            return f"evaluated {event['model'].removeprefix('SRV_')}"
        case _:
            return str(event["stage"])


def _judge(outcome: Outcome, workspace: Path, rounds: int, min_clients: int, trained: list[str]) -> None:
    """Whether the run did what the job asks, from its files; FLARE's exit code says nothing reliable."""
    outcome.errors = list(dict.fromkeys(outcome.errors))
    if len(outcome.rounds) < rounds or outcome.end is None:
        refusals = sum("refused" in error for error in outcome.errors)
        why = f"; {min_clients} sites were needed and {refusals} refused" if refusals else ""
        outcome.errors.append(f"the job ended after {len(outcome.rounds)} of {rounds} rounds{why}")
        return
    for record in outcome.rounds:
        if absent := sorted(set(trained) - set(record["sites"]) - set(record["refused"])):
            outcome.errors.append(f"round {record['round']}: nothing came from {', '.join(absent)}")
    results = workspace / "server" / SIMULATED_JOB_ID / "cross_site_val" / "cross_val_results.json"
    evaluated = json.loads(results.read_text()) if results.exists() else {}
    for site in outcome.sites:
        refused = any(error.startswith(f"site {site} refused") for error in outcome.errors)
        if not refused and set(evaluated.get(site) or {}) < {"SRV_best", "SRV_last"}:
            outcome.errors.append(f"site {site}: no evaluation of the global models came back")


def add_commands(subparsers: Any) -> None:
    """Registers ``workspace`` and ``simulate``."""
    parser = add_command(
        subparsers,
        "workspace",
        "make a workspace for the plain `nvflare simulator`",
        "python -m fedimaging workspace runs/sim --data data/demo",
        "Make a workspace that carries the sites' allow-list and dataset file, for `nvflare simulator`.",
    )
    parser.add_argument("workspace", type=Path, help="folder to make; a run deletes everything in it but local/")
    _add_data_option(parser)
    parser.set_defaults(run=_run_workspace)
    parser = add_command(
        subparsers,
        "simulate",
        "run a job over the sites of a data root, on this machine, and write its report",
        "python -m fedimaging simulate jobs/chest_xray_fedavg --data data/demo\n"
        "python -m fedimaging simulate jobs/chest_xray_fedavg --data data/real \\\n"
        "    --set rounds=14 --set task.classes=normal,pneumonia --set task.image_size=112",
        "Run a job folder in FLARE's simulator: one process a site, each with its own data.",
    )
    parser.add_argument("job", type=Path, help="job folder, for example jobs/chest_xray_fedavg")
    _add_data_option(parser)
    parser.add_argument("--workspace", type=Path, help="where the run goes (default: runs/<job>)")
    parser.add_argument("--sites", help="comma-separated names (default: all of the data root)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes",
        help="change a setting for this run; the job folder stays as it is, the report says it",
    )  # fmt: skip
    parser.add_argument("--start-from", type=Path, metavar="MODEL.pt", help="start from an earlier job's global model")
    parser.add_argument("--verbose", action="store_true", help="show FLARE's own log")
    parser.set_defaults(run=_run_simulate)


def _add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=Path(os.environ.get(DATA_ROOT_VARIABLE, "data/demo")),
        help=f"data root with <site>/<dataset>/manifest.json (default: ${DATA_ROOT_VARIABLE}, else data/demo)",
    )


def _run_workspace(arguments: argparse.Namespace) -> None:
    sites = make_workspace(arguments.workspace, arguments.data)
    command = simulator_command(Path("jobs/chest_xray_fedavg"), arguments.workspace, sites)
    console.print(f"made {arguments.workspace}; run a job in it with")
    print("nvflare " + shlex.join(command))


def _run_simulate(arguments: argparse.Namespace) -> int:
    from fedimaging.federation.job import parse_changes
    from fedimaging.report import write_report

    workspace = arguments.workspace or Path("runs") / arguments.job.resolve().name
    outcome = simulate(
        arguments.job,
        arguments.data,
        workspace,
        changes=parse_changes(arguments.changes),
        sites=arguments.sites.split(",") if arguments.sites else None,
        start_from=arguments.start_from,
        verbose=arguments.verbose,
        command="python -m fedimaging " + shlex.join(sys.argv[1:]),
    )
    for error in outcome.errors:
        print_error(error)
    if outcome.key_metric:
        html, _ = write_report(workspace)
        console.print(f"report: {html}", highlight=False, soft_wrap=True)
    if not outcome.errors and outcome.end is not None:
        console.print(
            f"done in {outcome.seconds:.0f} s: {len(outcome.sites)} sites, {len(outcome.rounds)} rounds; best model: "
            f"{workspace / 'server' / SIMULATED_JOB_ID / 'app_server' / 'best_FL_global_model.pt'}",
            highlight=False,
            soft_wrap=True,
        )
    return 1 if outcome.errors else 0
