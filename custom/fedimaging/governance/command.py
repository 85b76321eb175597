"""`python -m fedimaging grant` and `ledger`: the data owner's commands, on the site's machine."""

import argparse
import logging
import logging.handlers
import socket
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fedimaging.commands import add_command
from fedimaging.errors import FedImagingError
from fedimaging.governance.asked import find_job, in_words
from fedimaging.governance.grants import (
    ANY,
    GRANTS_FILE,
    Grant,
    Kind,
    new_id,
    read_grants,
    write_grants,
)
from fedimaging.governance.ledger import PASSED, Ledger, read_lines, read_records, rounds_used, verify

_SYSLOG_PORT = 514
_PROGRAM = "fedimaging-ledger"


def add_commands(subparsers: Any) -> None:
    """Registers `grant` and `ledger`."""
    grant = subparsers.add_parser("grant", help="say what jobs may do with this site's data")
    actions = grant.add_subparsers(metavar="COMMAND", required=True)
    _add(actions, "list", _list, "what is granted, how much of it is used up, and who asked in vain",
         "python -m fedimaging grant list --site /srv/fedimaging/hospital-a")  # fmt: skip
    show = _add(actions, "show", _show, "say in plain words what a job asks for and what would leave",
                "python -m fedimaging grant show 0b5e3c1a-7f1d-4c8e-9a53-2f6f0d9d7c11")  # fmt: skip
    show.add_argument("job", help="the id of a job that was sent to this site, or a job folder")
    give = _add(actions, "give", _give, "grant something",
                "python -m fedimaging grant give --dataset chest_xray --job chest_xray_fedavg \\\n"
                "      --submitter lead@example.org --rounds 12 --until 2026-12-31\n"
                "  python -m fedimaging grant give --as-asked JOB_ID --rounds 12 --until 2026-12-31")  # fmt: skip
    give.add_argument("--as-asked", metavar="JOB", help="a job as `grant show` takes it: fills in what is not given "
                      "here, and binds the grant to the job's very configuration")  # fmt: skip
    give.add_argument("--dataset", metavar="NAME", help=f"as in datasets.yml, or {ANY!r} for any")
    give.add_argument("--job", metavar="NAME", help=f"the job's name, or {ANY!r} for any")
    give.add_argument("--config", metavar="SHA256", help="only with this configuration (`grant show` says the hash)")
    give.add_argument("--submitter", metavar="NAME", help="who may submit it, by the name in their certificate")
    give.add_argument("--role", help="anyone of this role may, for example lead")
    give.add_argument("--anybody", action="store_true", help="whoever submits it, signed or not")
    give.add_argument("--kinds", default="train,evaluate", help="of train, evaluate (default: %(default)s)")
    give.add_argument("--rounds", type=int, required=True, metavar="N", help="how many rounds of training")
    give.add_argument("--until", required=True, metavar="YYYY-MM-DD", help="the last day, in UTC")
    take = _add(actions, "take", _take, "take grants back; a running job stops at its next batch",
                "python -m fedimaging grant take 3f9c2a1b")  # fmt: skip
    take.add_argument("ids", nargs="+", metavar="ID", help="as `grant list` says them")

    ledger = subparsers.add_parser("ledger", help="see what was done with this site's data")
    actions = ledger.add_subparsers(metavar="COMMAND", required=True)
    show = _add(actions, "show", _show_ledger, "the last lines, as a table",
                "python -m fedimaging ledger show --last 50")  # fmt: skip
    show.add_argument("--last", type=int, default=30, metavar="N", help="how many lines (default: %(default)s)")
    check = _add(actions, "verify", _verify, "whether a line was changed, removed or reordered; exits with 1 if so",
                 "python -m fedimaging ledger verify --contains 53a9fefb...")  # fmt: skip
    check.add_argument("--contains", metavar="SHA256", help="the last hash of an earlier check, kept elsewhere: "
                       "whether the ledger still goes on from there")  # fmt: skip
    export = _add(actions, "export", _export, "write the lines as they are, or send them to a log collector",
                  "python -m fedimaging ledger export > ledger.jsonl\n"
                  "  python -m fedimaging ledger export --syslog logs.example.org:514 --tcp --after 120")  # fmt: skip
    export.add_argument("--syslog", metavar="HOST[:PORT]", help="send each line there (or to a socket, /dev/log)")
    export.add_argument("--tcp", action="store_true", help="by TCP, a line each; the default is UDP")
    export.add_argument("--after", type=int, default=0, metavar="LINE", help="leave out the lines up to this number")
    report = _add(actions, "report", _report, "write the page for the data owner: what ran, left, and is granted",
                  "python -m fedimaging ledger report --out page.html")  # fmt: skip
    report.add_argument("--out", type=Path, metavar="FILE.html", help="where to (default: ledger-report.html in the "
                        "working folder)")  # fmt: skip


def _add(
    actions: Any, name: str, run: Callable[[argparse.Namespace, Path], int], text: str, example: str
) -> argparse.ArgumentParser:
    parser = add_command(actions, name, text, example)
    parser.add_argument(
        "--site",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="the site's folder: its kit, or <workspace>/<site> of a simulation (default: this folder)",
    )
    parser.set_defaults(run=lambda arguments: run(arguments, _site(arguments.site)))
    return parser


def _site(folder: Path) -> Path:
    if not (folder / "local").is_dir():
        raise FedImagingError(f"{folder}: no site's folder, it has no local/; name the kit's folder with --site")
    return folder


# -- grants ------------------------------------------------------------------------------------------------------------


def _list(_: argparse.Namespace, site: Path) -> int:
    grants, used, now = read_grants(site / "local" / GRANTS_FILE), rounds_used(site), datetime.now(UTC)
    table = _table("id", "dataset", "job", "who", "for", "rounds", "until", title="Granted")
    for grant in grants:
        job = f"{grant.job} (this configuration: {grant.config[:12]})" if grant.config else grant.job
        rounds = _rounds(grant, used(grant))
        until = f"{grant.until or 'no end'}{' (over)' if grant.expired(now) else ''}"
        table.add_row(grant.id, grant.dataset, job, grant.who, ", ".join(grant.kinds), rounds, until)
    _print(table if grants else "Nothing is granted: every job is refused.")
    refused = {str(r["job_id"]): r for r in read_records(site) if str(r.get("consent", "")).startswith("refused")}
    if refused:
        table = _table(
            "last asked", "job", "id", "dataset", "submitter", "why not", title="Refused for want of consent"
        )
        for job_id, record in list(refused.items())[-10:]:
            why = str(record["consent"]).removeprefix("refused: ")
            table.add_row(
                _minute(record), record["job"], job_id, record["dataset"], record["submitter"] or "unknown", why
            )
        _print(table)
    return 0


def _rounds(grant: Grant, used: int | None) -> str:
    if used is None:
        return f"void: another ledger counts the {grant.rounds}; give it anew"
    return f"{used} of {grant.rounds}" if grant.rounds else f"{used}, no limit"


def _show(arguments: argparse.Namespace, site: Path) -> int:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, words in in_words(find_job(site, arguments.job), site):
        table.add_row(what, words)
    _print(table)
    return 0


def _give(arguments: argparse.Namespace, site: Path) -> int:
    path = site / "local" / GRANTS_FILE
    grants = read_grants(path) if path.exists() else []
    asked = find_job(site, arguments.as_asked) if arguments.as_asked else None
    values = {
        "dataset": arguments.dataset or (asked and asked.dataset),
        "job": arguments.job or (asked and asked.name),
        "config": arguments.config or (asked and asked.config),
        "submitter": ANY if arguments.anybody else arguments.submitter,
        "role": arguments.role,
    }
    if asked and asked.signed and not (values["submitter"] or values["role"]):
        values["submitter"] = asked.submitter
    if missing := [f"--{name}" for name in ("dataset", "job") if not values[name]]:
        raise FedImagingError(f"grant give: {' and '.join(missing)} missing; or name a job with --as-asked")
    if not values["submitter"] and not values["role"]:
        raise FedImagingError("grant give: say to whom: --submitter NAME, --role ROLE or --anybody")
    grant = _new_grant(
        {
            "id": new_id(grants),
            **values,
            "kinds": arguments.kinds.split(","),
            "rounds": arguments.rounds,
            "until": _day(arguments.until),
        }
    )
    with Ledger(site).locked() as ledger:
        grant = grant.model_copy(update={"ledger": ledger.id})
    write_grants(path, [*grants, grant])
    _print(
        f"granted ({grant.id}): {grant.who} may {' and '.join(grant.kinds)} on {grant.dataset} with {grant.job}, "
        f"{grant.rounds} rounds, until {grant.until}"
    )
    return 0


def _new_grant(values: dict[str, Any]) -> Grant:
    try:
        return Grant.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0]) if first["loc"] else "it"
        known = f"; it is one of {', '.join(Kind)}" if name == "kinds" else ""
        raise FedImagingError(f"grant give --{name}: {first['msg']}{known}") from None


def _day(text: str) -> date:
    try:
        day = date.fromisoformat(text)
    except ValueError:
        raise FedImagingError(f"grant give --until {text}: expected a day such as 2026-12-31") from None
    if day < datetime.now(UTC).date():
        raise FedImagingError(f"grant give --until {text}: that day is over")
    return day


def _take(arguments: argparse.Namespace, site: Path) -> int:
    path = site / "local" / GRANTS_FILE
    grants = read_grants(path)
    known = {grant.id for grant in grants}
    if unknown := [name for name in arguments.ids if name not in known]:
        raise FedImagingError(f"grant take {unknown[0]}: no such grant; `grant list` says which there are")
    write_grants(path, [grant for grant in grants if grant.id not in arguments.ids])
    _print(f"taken back: {', '.join(arguments.ids)}; a job that runs by it stops at its next batch")
    return 0


# -- the ledger --------------------------------------------------------------------------------------------------------


def _show_ledger(arguments: argparse.Namespace, site: Path) -> int:
    records = read_records(site)
    table = _table("time (UTC)", "job", "submitter", "dataset", "what", "round", "cases", "MB out", "verdict")
    for record in records[max(0, len(records) - arguments.last) :]:
        number = record.get("round")
        table.add_row(
            _minute(record),
            record.get("job"),
            record.get("submitter") or "-",
            record.get("dataset"),
            str(record.get("task")),
            "-" if number is None else str(number),
            "-" if record.get("cases") is None else str(record["cases"]),
            f"{record.get('bytes_out', 0) / 1e6:.2f}",
            verdict(record),
        )
    _print(table if records else "Nothing yet: no task has reached this site.")
    return 0


def verdict(record: dict[str, Any]) -> str:
    """What became of a task, in few words."""
    consent, gate = str(record.get("consent", "")), str(record.get("gate", ""))
    if gate == PASSED:
        return "left"
    return consent if consent.startswith("refused") else gate


def _verify(arguments: argparse.Namespace, site: Path) -> int:
    check = verify(site)
    if arguments.contains and arguments.contains not in check.hashes:
        check.faults.append(f"no line has the hash {arguments.contains}: what it stood for was changed or removed")
    for fault in check.faults:
        print(fault)
    if not check.faults:
        print(f"whole: {check.lines} lines; the last has the hash {check.last}")
    if check.unfinished:
        print("a crash cut short the line after it: that was not written, and what it would have told of did not leave")
    return 1 if check.faults else 0


def _export(arguments: argparse.Namespace, site: Path) -> int:
    lines = read_lines(site)[max(0, arguments.after) :]
    if arguments.syslog is None:
        sys.stdout.buffer.write(b"".join(lines))
        sys.stdout.buffer.flush()
        return 0
    _send(arguments.syslog, arguments.tcp, [line.decode(errors="replace").rstrip("\n") for line in lines])
    print(f"sent {len(lines)} lines; next time: --after {max(0, arguments.after) + len(lines)}", file=sys.stderr)
    return 0


class _Syslog(logging.handlers.SysLogHandler):
    """The standard library's, but an error is an error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        raise  # noqa: PLE0704 (called where the error is handled)


def _send(where: str, tcp: bool, lines: Sequence[str]) -> None:
    """Sends lines as syslog messages (RFC 3164; by TCP a line each, RFC 6587)."""
    host, _, port = where.partition(":")
    try:
        address: str | tuple[str, int] = where if where.startswith("/") else (host, int(port or _SYSLOG_PORT))
        kind = socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM
        handler = _Syslog(address, socktype=None if isinstance(address, str) else kind)
        handler.append_nul = False
        stamp = datetime.now(UTC).strftime("%b %e %H:%M:%S")
        handler.setFormatter(logging.Formatter(f"{stamp} {socket.gethostname()} {_PROGRAM}: %(message)s"))
        for line in lines:
            handler.emit(logging.makeLogRecord({"msg": "%s", "args": (line + "\n" * tcp,), "levelname": "INFO"}))
        handler.close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "expected HOST[:PORT] or /dev/log"
        raise FedImagingError(f"ledger export --syslog {where}: {reason}") from None


def _report(arguments: argparse.Namespace, site: Path) -> int:
    from fedimaging.governance.page import write_page

    for path in write_page(site, arguments.out):
        print(path)
    return 0


def _table(*columns: str, title: str | None = None) -> Table:
    return Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD)


def _minute(record: dict[str, Any]) -> str:
    return str(record.get("time", ""))[:16].replace("T", " ")


def _print(what: Any) -> None:
    Console().print(what, highlight=False, markup=False)
