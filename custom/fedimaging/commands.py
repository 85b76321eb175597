"""What all commands of this project have in common: how help looks, and how a mistake is told."""

import argparse
from typing import Any

from rich.console import Console
from rich.text import Text


def add_command(subparsers: Any, name: str, says: str, example: str) -> argparse.ArgumentParser:
    """Registers a command; ``says`` is what it does, as a line of the list of commands."""
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=says,
        description=says[0].upper() + says[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def print_error(message: object) -> None:
    """One line on standard error."""
    Console(stderr=True).print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True)
