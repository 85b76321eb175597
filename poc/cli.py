"""`python -m poc`: the commands."""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedimaging.cli import main as fedimaging
from fedimaging.commands import add_command, print_error
from fedimaging.errors import FedImagingError
from fedimaging.simulator import Outcome, Tail, show_event
from poc.federation import DEFAULT_FOLDER, DEFAULT_PORT, Poc, console, free_port, port_is_free


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code: 0, 1 where a job failed, 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments, Poc(arguments.folder)) or 0)
    except FedImagingError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped; the federation still runs, end it with `python -m poc down`")
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m poc",
        description="The real federation as separate processes on this machine. Each command shows the nvflare "
        "commands that it runs.",
        epilog="example:\n  python -m poc up\n  python -m poc submit jobs/chest_xray_fedavg\n  python -m poc result\n"
        "  python -m poc down",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    command = _add(commands, "up", "make and start the federation, or what of it is down", "up --data data/real", _up)
    command.add_argument("--data", type=Path, help="data root, <site>/<dataset>/ (default: synthetic hospitals)")
    command.add_argument("--port", type=int, help=f"the server's port (default: {DEFAULT_PORT} or the next free one)")
    command = _add(commands, "submit", "submit a job folder", "submit jobs/chest_xray_fedavg --set rounds=3", _submit)
    command.add_argument("job", type=Path, metavar="JOB", help="job folder")
    command.add_argument(
        "--set", dest="changes", action="append", default=[], metavar="NAME=VALUE", help="change a setting for this run"
    )
    command.add_argument("--resume", metavar="JOB_ID", help="continue this interrupted job after its last round")
    command = _add(commands, "result", "follow a job, download it and write its report", "result", _result)
    command.add_argument("job_id", nargs="?", metavar="JOB_ID", help="default: the job submitted last")
    _add(commands, "status", "say what runs", "status", _status)
    command = _add(commands, "down", "stop everything", "down", _down)
    command.add_argument("--clean", action="store_true", help="delete the folder too, with jobs, results and data")
    return parser


def _add(commands: Any, name: str, says: str, example: str, run: Any) -> argparse.ArgumentParser:
    command = add_command(commands, name, says, f"python -m poc {example}")
    command.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help=f"default: {DEFAULT_FOLDER}")
    command.set_defaults(run=run)
    return command


def _say(text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)


def _up(arguments: argparse.Namespace, poc: Poc) -> None:
    data = _data(arguments.data, poc)
    running = poc.running() if poc.prepared else {}
    if running and not poc.fits(data, arguments.port):
        raise FedImagingError(
            "a POC of other data, another port or an older package runs in this folder; stop it with "
            "`python -m poc down`, or name another --folder"
        )
    if not running:
        for process in poc.processes() if poc.prepared else []:
            _say(f"a process of an earlier POC is left, {process.pid}; it is ended")
            process.kill()
        if not poc.fits(data, arguments.port):
            poc.prepare(data, _port(arguments.port))
        elif not port_is_free(poc.port):
            raise FedImagingError(
                f"port {poc.port} is taken by another program; stop that, or `python -m poc up --port {poc.port + 1}`"
            )
    down = [name for name in (poc.server, *poc.sites) if name not in running]
    if running and down:
        _say(f"half of it runs; starting {', '.join(down)}")
    if down:
        poc.start(down)
    else:
        _say("it runs already")
    _say(f"{len(poc.sites)} sites are registered at localhost:{poc.port}: {', '.join(poc.sites)}")
    _say("next: python -m poc submit jobs/chest_xray_fedavg")
    _say(f"the admin console: {poc.kit('lead') / 'startup' / 'fl_admin.sh'}, user {poc.kit('lead').name}")


def _data(data: Path | None, poc: Poc) -> Path:
    if data is not None:
        return data
    synthetic = poc.folder / "data"
    if not synthetic.exists():
        _say(f"$ python -m fedimaging data synth --out {synthetic}")
        if fedimaging(["data", "synth", "--out", str(synthetic)]):
            raise FedImagingError(f"{synthetic}: no synthetic hospitals were made; see above")
    return synthetic


def _port(wanted: int | None) -> int:
    if wanted is not None:
        if not port_is_free(wanted):
            raise FedImagingError(f"port {wanted} is taken by another program; name another --port")
        return wanted
    port = free_port(DEFAULT_PORT)
    if port != DEFAULT_PORT:
        _say(f"port {DEFAULT_PORT} is taken; using {port}")
    return port


def _submit(arguments: argparse.Namespace, poc: Poc) -> int:
    from fedimaging.federation.check import check
    from fedimaging.federation.job import JobFolder, parse_changes

    _require_running(poc)
    job, folder = JobFolder(arguments.job), arguments.job.resolve()
    changes = parse_changes(arguments.changes) | ({"continues": arguments.resume} if arguments.resume else {})
    if changes:
        job.override(changes)
        job.settings()
        folder = poc.folder / "submitted" / job.name
        shutil.rmtree(folder, ignore_errors=True)
        job.write(folder)
    problems = check(folder)
    for problem in problems:
        print_error(problem)
    if problems:
        return 2
    print(poc.submit(folder))
    _say("next: python -m poc result")
    return 0


def _result(arguments: argparse.Namespace, poc: Poc) -> int:
    from fedimaging.report import write_report

    _require_running(poc)
    job_id = arguments.job_id or poc.last_job
    if not poc.status_of(job_id):
        raise FedImagingError(f"the server knows no job {job_id}; `nvflare job list` shows them")
    outcome, tail = Outcome(poc.sites), Tail(poc.rounds_file(job_id))
    with poc.waiting(job_id) as process, console.status("waiting for the job; Ctrl-C leaves it running"):
        while process.poll() is None:
            for event in tail.read():
                show_event(event, outcome)
            time.sleep(0.5)
    status, folder = poc.status_of(job_id), poc.download(job_id)
    rounds = next(folder.rglob("rounds.jsonl"), None)
    if rounds is None:
        raise FedImagingError(f"job {job_id} ended as {status} before its first round; see {folder}")
    tail.path = rounds
    for event in tail.read():
        show_event(event, outcome)
    html, _ = write_report(rounds.parent, folder / "report.html")
    _say(f"{status}: {len(outcome.rounds)} rounds; report: {html}")
    if outcome.end is None and outcome.rounds:
        _say(f"it was interrupted; continue it with: python -m poc submit JOB --resume {job_id}")
    return 0 if outcome.end is not None and status == "FINISHED:COMPLETED" else 1


def _status(_: argparse.Namespace, poc: Poc) -> int:
    table, running = Table("participant", "process", "state"), poc.running()
    for name in (poc.server, *poc.sites):
        process = running.get(name)
        table.add_row(name, str(process.pid) if process else "", process.status() if process else "down")
    console.print(table)
    if poc.server not in running:
        _say("start what is down: python -m poc up")
        return 1
    print(poc.nvflare("job", "list", "--startup-kit", str(poc.kit("lead"))).rstrip())
    return 0 if len(running) == 1 + len(poc.sites) else 1


def _down(arguments: argparse.Namespace, poc: Poc) -> None:
    killed = poc.stop() if poc.prepared else []
    if killed:
        _say(f"did not stop by themselves and were killed: {', '.join(map(str, killed))}")
    left = poc.processes() if poc.prepared else []
    if left:
        raise FedImagingError(f"still running: {', '.join(str(process.pid) for process in left)}; kill them")
    if arguments.clean:
        shutil.rmtree(poc.folder, ignore_errors=True)
    _say("no process of the POC is left")


def _require_running(poc: Poc) -> None:
    if not poc.prepared or poc.server not in poc.running():
        raise FedImagingError("no POC runs in this folder; start it with `python -m poc up`")
