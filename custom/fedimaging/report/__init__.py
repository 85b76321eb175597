"""The report of a job: one HTML page that needs no network, and the same figures as JSON."""

import argparse
from pathlib import Path
from typing import Any

from fedimaging.commands import add_command


def write_report(workspace: Path, out: Path | None = None, site: str | None = None) -> tuple[Path, Path]:
    """Writes the report of a simulator workspace or a downloaded job.

    Args:
        workspace: the folder of the run.
        out: the HTML file, by default report.html or, for a site's own, report-<site>.html in the workspace. The JSON
            lies beside it.
        site: adds this site's per-case results; both files are then readable by their owner only.

    Returns:
        the HTML file and the JSON file.

    Raises:
        FedImagingError: the workspace holds no run of ours, a file of it is damaged, or the report cannot be written.
    """
    from fedimaging.report.collect import collect
    from fedimaging.report.html import render, write_files

    report = collect(workspace, site)
    out = out or workspace / (f"report-{site}.html" if site else "report.html")
    return write_files(out, render(report, workspace), report, private=site is not None)


def add_commands(subparsers: Any) -> None:
    """Registers `report`."""
    parser = add_command(
        subparsers,
        "report",
        "write the report of a job as HTML and JSON",
        "python -m fedimaging report runs/demo\npython -m fedimaging report runs/demo --site hospital-a",
        "Writes the report of a simulation or a downloaded job as one HTML file, and as JSON beside it.",
    )
    parser.add_argument("workspace", type=Path, help="the folder that `simulate` or the console's `download_job` wrote")
    parser.add_argument(
        "--out", type=Path, metavar="FILE.html", help="where to write (default: report.html in the workspace)"
    )
    parser.add_argument(
        "--site",
        metavar="NAME",
        help="add the per-case results of this site: for the hospital's own eyes, never to be sent",
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    for path in write_report(arguments.workspace, arguments.out, arguments.site):
        print(path)
    return 0


__all__ = ["add_commands", "write_report"]
