"""`python -m fedimaging`: the commands."""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from fedimaging import __version__
from fedimaging.commands import print_error
from fedimaging.errors import FedImagingError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code: 0, 1 where a run failed, 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except FedImagingError as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped", highlight=False)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _parser() -> argparse.ArgumentParser:
    from fedimaging import compare, report, simulator
    from fedimaging.datasets import index, synthetic
    from fedimaging.federation import command as federation
    from fedimaging.governance import command as governance

    parser = argparse.ArgumentParser(
        prog="python -m fedimaging",
        description="Federated learning for hospital imaging.",
        epilog="example:\n  python -m fedimaging simulate jobs/chest_xray_fedavg --data data/demo",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"fedimaging {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    data = commands.add_parser("data", help="make manifests and synthetic hospitals").add_subparsers(
        metavar="COMMAND", required=True
    )
    index.add_commands(data)
    synthetic.add_commands(data)
    _add_clear_cache(data)
    simulator.add_commands(commands)
    federation.add_commands(commands)
    report.add_commands(commands)
    governance.add_commands(commands)
    compare.add_commands(commands)
    return parser


def _add_clear_cache(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "clear-cache",
        help="delete the decoded images that training keeps on disk",
        description="Delete the disk cache of decoded images, $XDG_CACHE_HOME/fedimaging (~/.cache/fedimaging).",
        epilog="example:\n  python -m fedimaging data clear-cache",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_run_clear_cache)


def _run_clear_cache(_: argparse.Namespace) -> None:
    from fedimaging.training.cache import cache_folder, clear_cache

    print(f"{cache_folder()}: {clear_cache() / 2**20:.1f} MiB freed")
