"""What all commands of this project have in common: how help looks, and how a mistake is told."""

import argparse
from textwrap import indent
from typing import Any

from rich.console import Console
from rich.text import Text


def add_command(
    subparsers: Any, name: str, says: str, example: str, description: str | None = None
) -> argparse.ArgumentParser:
    """Registers a command.

    Args:
        says: what it does, as a line of the list of commands.
        example: one command, or lines of several.
        description: what its own help says instead, in lines.
    """
    command: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=says,
        description=description or says[0].upper() + says[1:] + ".",
        epilog=("examples:\n" if "\n" in example else "example:\n") + indent(example, "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return command


def print_error(message: object) -> None:
    """One line on standard error."""
    Console(stderr=True).print(Text.assemble(("error:", "red"), f" {message}"), soft_wrap=True)
