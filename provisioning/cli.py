"""`python -m provisioning`: the commands of the project admin, and those of kit.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedimaging import __version__
from fedimaging.commands import add_command, print_error
from fedimaging.errors import FedImagingError
from fedimaging.federation.revocation import REVOCATION_LIST
from fedimaging.version import package_hash
from provisioning import kit
from provisioning.federation import Federation, build, certificate_builder, default_folder
from provisioning.handover import hand_over
from provisioning.keys import PASSPHRASE_VARIABLE, Keys, admin_passphrase
from provisioning.kit import KitError, hash_file, spoken
from provisioning.lifecycle import remove, renew, standings
from provisioning.lock import LOCKS, locked, write_locks
from provisioning.package import write_package
from provisioning.project import PROJECT_FILE, ProjectFile, check


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command. Returns its exit code: 0, 1 where a kit was refused, 2 for a mistake of the user."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments) or 0)
    except (FedImagingError, KitError) as error:
        print_error(error)
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("stopped", highlight=False)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m provisioning",
        description="Startup kits for the participants of a federation.",
        epilog="examples:\n"
        "  python -m provisioning check\n"
        "  python -m provisioning build\n"
        "  python -m provisioning handover hospital-a\n"
        "  python -m provisioning status\n"
        "  python -m provisioning verify KIT --name hospital-a --root '3f2a ...' --code '91bc ...'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add(commands, "check", "tell by line what is wrong with project.yml", "check --project my/project.yml", _run_check)
    command = _add(
        commands,
        "build",
        "build and sign the kits of all who have none yet",
        "build --project my/project.yml",
        _run_build,
    )
    command.add_argument(
        "--request",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="build around this certificate request, or those in this folder; the private key stays where it is",
    )
    kit.add_passphrase_file(command, PASSPHRASE_VARIABLE)
    command = _add(commands, "handover", "encrypt a kit for its participant", "handover hospital-a", _run_handover)
    command.add_argument("name", help="the participant")
    command = _add(
        commands,
        "package",
        "write the site package of this version, for the sites to install",
        "package --out fedimaging-0.2.0.package",
        _run_package,
    )
    command.add_argument("--out", type=Path, required=True, help="the file to write")
    kit.add_passphrase_file(command, PASSPHRASE_VARIABLE)
    command = commands.add_parser(
        "lock",
        help="write the lock files and bills of materials anew",
        description="Write the lock files and bills of materials anew, as requirements.txt says. Needs the internet.",
        epilog="example:\n  python -m provisioning lock",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--upgrade", action="store_true", help="take the newest of what requirements.txt does not pin")
    command.set_defaults(run=_run_lock)
    command = _add(commands, "renew", "sign a new certificate for a participant", "renew hospital-a", _run_renew)
    command.add_argument("name", help="the participant")
    command.add_argument("--days", type=int, help="how long it is valid (default: valid_days of the project's file)")
    command.add_argument("--request", type=Path, metavar="FILE", help="of a new private key that the participant made")
    command.add_argument("--revoke", action="store_true", help="make the server refuse all its certificates so far")
    kit.add_passphrase_file(command, PASSPHRASE_VARIABLE)
    command = _add(
        commands, "remove", "make the server refuse a hospital or a person", "remove hospital-c", _run_remove
    )
    command.add_argument("name", help="the participant")
    kit.add_passphrase_file(command, PASSPHRASE_VARIABLE)
    _add(commands, "status", "list participants, certificates and packages", "status", _run_status)
    kit.add_commands(commands, status=False)
    return parser


def _add(commands: Any, name: str, says: str, example: str, run: Any) -> argparse.ArgumentParser:
    command = add_command(commands, name, says, f"python -m provisioning {example}")
    command.add_argument(
        "--project", type=Path, default=PROJECT_FILE, help="the federation's file (default: provisioning/project.yml)"
    )
    command.add_argument(
        "--folder", type=Path, help="where the federation is kept (default: ~/.local/share/fedimaging/<its name>)"
    )
    command.set_defaults(run=run)
    return command


def _federation(arguments: argparse.Namespace, file: ProjectFile) -> Federation:
    return Federation(arguments.folder or default_folder(str(file.content.get("name"))))


def _run_check(arguments: argparse.Namespace) -> int:
    file = ProjectFile(arguments.project)
    problems = check(file, _federation(arguments, file).participants)
    out = Console(stderr=True)
    for problem in problems:
        kind = "[yellow]warning[/yellow]" if problem.warning else "[red]error[/red]"
        where = escape(f"{arguments.project}:{problem.line}")
        out.print(f"{where}: {kind}: {escape(problem.text)}", highlight=False, soft_wrap=True)
    errors = sum(not problem.warning for problem in problems)
    out.print(
        f"{arguments.project}: {errors} errors, {len(problems) - errors} warnings", highlight=False, soft_wrap=True
    )
    return 2 if errors else 0


def _run_build(arguments: argparse.Namespace) -> None:
    file = ProjectFile(arguments.project)
    federation = _federation(arguments, file)
    new = build(file, federation, admin_passphrase(arguments, federation.folder), arguments.request)
    out = Console(stderr=True)
    if not new:
        out.print("nothing to build: every participant has a kit", highlight=False)
        return
    table = Table(
        "participant", "type", "organisation", "valid until", title=f"New kits in {federation.folder / 'kits'}"
    )
    for name in new:
        entry = federation.participants[name]
        table.add_row(name, entry["type"], entry["org"], entry["valid_until"][:10])
    out.print(table)
    for name in new:
        if digits := federation.participants[name].get("own_key"):
            text = f"{name} made its own key. Its fingerprint, to be compared over the phone: {spoken(digits)}"
            out.print(text, highlight=False, soft_wrap=True)
    out.print(f"root certificate  {spoken(federation.record['root'])}", highlight=False, soft_wrap=True)
    out.print(f"code-signing key  {spoken(federation.record['code'])}", highlight=False, soft_wrap=True)
    out.print("next: python -m provisioning handover NAME, for each of them", highlight=False)


def _run_package(arguments: argparse.Namespace) -> None:
    federation = _federation(arguments, ProjectFile(arguments.project))
    if not federation.participants:
        raise FedImagingError(f"{federation.folder}: no kit was built yet; kits come with the package of their day")
    keys = Keys.read(federation.folder, admin_passphrase(arguments, federation.folder)())
    write_package(arguments.out, keys.code_key)
    out = Console(stderr=True)
    out.print(f"{arguments.out}: fedimaging {__version__}", highlight=False, soft_wrap=True)
    out.print(f"sources   {spoken(package_hash())}", highlight=False, soft_wrap=True)
    out.print(f"the file  {spoken(hash_file(arguments.out))}", highlight=False, soft_wrap=True)
    out.print("next: send it to the sites; each runs `kit.py install KIT FILE --pins PINS`", highlight=False)


def _run_lock(arguments: argparse.Namespace) -> None:
    with Console(stderr=True).status("asking pip, nothing is installed"):
        write_locks(arguments.upgrade)
    for lock in LOCKS:
        print(f"{lock.path.name}: {len(locked(lock))} packages")


def _run_renew(arguments: argparse.Namespace) -> None:
    file = ProjectFile(arguments.project)
    federation = _federation(arguments, file)
    federation.participant(arguments.name)
    days = certificate_builder(file).valid_days if arguments.days is None else arguments.days
    passphrase = admin_passphrase(arguments, federation.folder)()
    certificate = renew(
        federation, arguments.name, passphrase, days, request=arguments.request, revoke=arguments.revoke
    )
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    out.print(f"{arguments.name}: valid until {federation.participants[arguments.name]['valid_until'][:10]}")
    if certificate is None:
        out.print("its kit is still here and holds the new certificate; hand it over as usual")
    else:
        out.print(f"{certificate}: send it; nothing in it is secret. At the site:")
        key = f" --key {arguments.name}.key" if arguments.request else ""
        out.print(f"  python kit.py install-certificate KIT {certificate.name} --pins PINS{key}   and a restart")
    if arguments.revoke:
        _say_list(out, federation.folder / REVOCATION_LIST)


def _run_remove(arguments: argparse.Namespace) -> None:
    federation = _federation(arguments, ProjectFile(arguments.project))
    federation.participant(arguments.name)
    path = remove(federation, arguments.name, admin_passphrase(arguments, federation.folder)())
    out = Console(stderr=True, highlight=False, soft_wrap=True)
    out.print(f"{arguments.name}: removed; the name does not come back. Delete it from {arguments.project}.")
    _say_list(out, path)
    out.print("jobs that a removed person left running go on; end them in the console with abort_job")


def _say_list(out: Console, path: Path) -> None:
    out.print(f"{path}: copy this to the server, over local/{path.name} of its kit. It counts within seconds; until")
    out.print("then nothing has changed there.")


def _run_status(arguments: argparse.Namespace) -> None:
    federation = _federation(arguments, ProjectFile(arguments.project))
    found = standings(federation)
    if not found:
        raise FedImagingError(f"{federation.folder}: nothing was built yet; run `python -m provisioning build`")
    table = Table("participant", "is", "organisation", "days left", "kit", "private key", "package")
    for one in found:
        days = f"[red]{one.days_left}[/red]" if one.warns else str(one.days_left)
        table.add_row(
            escape(one.name), one.type, one.org, "" if one.removed else days, one.kit,
            "" if one.removed else one.key, one.package, style="dim" if one.removed else None,
        )  # fmt: skip
    Console(soft_wrap=True).print(table)
    print(f"root certificate: valid until {federation.record['root_valid_until'][:10]}")
    print(f"revocation list: number {federation.record.get('revocations', 0)}")
    for one in found:
        if one.warns:
            print(f"warning: {one.name}: {one.days_left} days left; `python -m provisioning renew {one.name}`")


def _run_handover(arguments: argparse.Namespace) -> None:
    federation = _federation(arguments, ProjectFile(arguments.project))
    folder, passphrase = hand_over(federation, arguments.name)
    out = Console(stderr=True)
    out.print(
        f"{folder}: send this folder; read out the fingerprints of sheet.txt by phone", highlight=False, soft_wrap=True
    )
    out.print("the archive's passphrase is shown this once and kept nowhere; send it by another way:", highlight=False)
    print(passphrase)
