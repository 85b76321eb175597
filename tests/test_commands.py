"""What all commands have in common."""

import argparse

import pytest

from fedimaging.commands import add_command, print_error


@pytest.mark.parametrize("message", ["a [red]b", "list[int]: [1]", "[/]", r"x\[red]", "a trailing \\"])
def test_a_message_is_printed_as_it_is_in_one_line(message, capsys):
    print_error(message)
    out, err = capsys.readouterr()
    assert (out, err) == ("", f"error: {message}\n")


def test_help_says_what_a_command_does_and_gives_an_example():
    parser = argparse.ArgumentParser()
    command = add_command(parser.add_subparsers(), "show", "show it all", "python -m thing show 3")
    assert "show it all" in parser.format_help()
    assert "Show it all." in command.format_help()
    assert command.format_help().endswith("example:\n  python -m thing show 3\n")


def test_help_may_give_several_examples_and_say_more():
    parser = argparse.ArgumentParser()
    command = add_command(parser.add_subparsers(), "show", "show it", "thing show 3\nthing show 4", "Shows\nwhat is.")
    assert "\nShows\nwhat is.\n" in command.format_help()
    assert command.format_help().endswith("examples:\n  thing show 3\n  thing show 4\n")
