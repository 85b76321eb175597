"""`python -m fedimaging job ...` and `bundle`."""

import argparse
from pathlib import Path
from typing import Any

from fedimaging.commands import add_command, print_error
from fedimaging.errors import FedImagingError


def add_commands(subparsers: Any) -> None:
    """Registers `job check`, `job resume`, `job settings` and `bundle`."""
    program = "python -m fedimaging"
    job = subparsers.add_parser("job", help="check a job, continue one, list what a job may set").add_subparsers(
        metavar="COMMAND", required=True
    )
    command = add_command(
        job, "check", "say what is wrong with job folders", f"{program} job check jobs/chest_xray_fedavg"
    )
    command.set_defaults(run=_check)
    command.add_argument("jobs", nargs="+", type=Path, metavar="JOB", help="job folders")
    command = add_command(
        job,
        "resume",
        "write a job that continues an interrupted one from its last global model",
        f"{program} job resume jobs/chest_xray_fedavg --of 0d9f1a52-... --out runs/resumed",
    )
    command.set_defaults(run=_resume)
    command.add_argument("job", type=Path, metavar="JOB", help="the folder of the job that was interrupted")
    command.add_argument("--of", required=True, metavar="JOB_ID", help="its id; `nvflare job list` shows it")
    command.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="where to write; a new folder")
    command = add_command(job, "settings", "list everything that a job may set, as Markdown", f"{program} job settings")
    command.set_defaults(run=_settings)
    command = add_command(
        subparsers,
        "bundle",
        "copy a job with this package inside, for federations that take code with a job (BYOC)",
        f"{program} bundle jobs/chest_xray_fedavg --out runs/bundle/chest_xray_fedavg",
    )
    command.set_defaults(run=_bundle)
    command.add_argument("job", type=Path, metavar="JOB", help="job folder")
    command.add_argument("--out", required=True, type=Path, metavar="DIR", help="where to write; a new folder")


def _check(arguments: argparse.Namespace) -> int:
    from fedimaging.federation.check import check

    problems = []
    for folder in arguments.jobs:
        found = check(folder)
        problems += found
        for problem in found:
            print_error(problem)
        if not found:
            print(f"{folder}: good")
    return 2 if problems else 0


def _resume(arguments: argparse.Namespace) -> None:
    from fedimaging.federation.job import JobFolder

    if arguments.out.exists():
        raise FedImagingError(f"{arguments.out}: exists already; name a new folder with --out")
    job = JobFolder(arguments.job)
    job.override({"continues": arguments.of})
    job.settings()
    job.write(arguments.out)
    print(f"{arguments.out}: submit this folder; it starts after the last round of {arguments.of}")


def _settings(_: argparse.Namespace) -> None:
    from fedimaging.federation.settings_table import settings_table

    print(settings_table())


def _bundle(arguments: argparse.Namespace) -> None:
    from fedimaging.federation.bundle import bundle

    for name, value in bundle(arguments.job, arguments.out).items():
        print(f"{value}  {name}")
