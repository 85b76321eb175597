"""The ledger: one JSON line for each task that a site was given, in order, each with the hash of the one before.

``ledger.jsonl`` lies in the site's folder beside FLARE's logs, and ``ledger.head`` beside it: how many lines there are
and the SHA-256 of the last, so that an end that was cut off or added shows too. ``ledger.head`` is also the lock
(flock) under which lines of several jobs are written. It first names the line that is to come by its hash, then the
line is written, then the head says that it is there: a crash at any moment leaves a head that allows this line or none,
and no other. A line is on the disk (fsync) before what it tells of leaves the site. The file is not rotated: a line has
under 1 kB, and a chain that starts anew would prove nothing.

A ledger has an id, drawn when it begins. A grant of rounds names the ledger that counts them: where that one was set
aside or lost, the grant is void.

The chain proves edits to whoever keeps an earlier head, for example in the log collector that ``ledger export`` feeds:
who can write the folder can write a new chain.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from io import RawIOBase
from pathlib import Path
from typing import Any, Final

from fedimaging.errors import FedImagingError, Reason
from fedimaging.governance.grants import Grant, Kind

log = logging.getLogger(__name__)

LEDGER_FILE: Final = "ledger.jsonl"
HEAD_FILE: Final = "ledger.head"
START: Final = "0" * 64
"""what the first line has as the hash of the one before"""
PASSED: Final = "passed"

_ID_BYTES = 8
_HEAD_BYTES = 512
"""a head always has this size, so that one write replaces it"""


@dataclass
class Entry:
    """What is written of one task. No field can hold a patient's identifier: names come from the job and the site.

    Args:
        kind: of use; None for a task that the site does not know.
        manifest: SHA-256 of the dataset's manifest, once the dataset was opened.
        bytes_out: of the canonical form of what left; 0 where nothing did.
        sha256: of the same.
        grant: the id of the grant that allowed it.
        consent: "granted", or why not.
        gate: "passed", or what was stopped and why, or what happened in its place.
        counts: whether it used up a round of the grant.
    """

    site: str
    job_id: str
    job: str
    config: str
    submitter: str
    role: str
    signed: bool
    dataset: str
    task: str
    kind: Kind | None
    round: int | None = None
    manifest: str | None = None
    cases: int | None = None
    seconds: float = 0.0
    bytes_out: int = 0
    sha256: str | None = None
    grant: str | None = None
    consent: str = "not asked"
    gate: str = ""
    counts: bool = False

    @property
    def left(self) -> bool:
        """Whether a result left the site."""
        return self.gate == PASSED


@dataclass(frozen=True)
class Check:
    """What verification of a ledger found; it is whole if there are no faults."""

    hashes: list[str]
    """of each line, in order"""
    faults: list[str]
    unfinished: bool = False
    """whether a crash left a line that was begun; it was not written, and what it would have told of did not leave"""

    @property
    def lines(self) -> int:
        return len(self.hashes)

    @property
    def last(self) -> str:
        return self.hashes[-1] if self.hashes else START


@dataclass(frozen=True)
class Head:
    """What ``ledger.head`` says.

    Args:
        id: of the ledger.
        lines: how many are in it.
        last: the hash of the last.
        coming: the hash of the line that is being written; None between two.
    """

    id: str
    lines: int = 0
    last: str = START
    coming: str | None = None

    @classmethod
    def parse(cls, raw: bytes) -> "Head | None":
        """None if it is damaged."""
        try:
            head = cls(**json.loads(raw))
        except (ValueError, TypeError, RecursionError):
            return None
        coming_fits = head.coming is None or isinstance(head.coming, str)
        fits = isinstance(head.id, str) and type(head.lines) is int and head.lines >= 0 and isinstance(head.last, str)
        return head if fits and coming_fits else None

    def raw(self) -> bytes:
        return json.dumps(vars(self)).encode().ljust(_HEAD_BYTES - 1) + b"\n"

    def fits(self, lines: int, before: str, last: str) -> bool:
        """Whether a ledger may end so: how many lines it has, and the hashes of the last two."""
        if lines == self.lines:
            return last == self.last
        return lines == self.lines + 1 and (before, last) == (self.last, self.coming)


class Ledger:
    """A site's ledger.

    Args:
        folder: the site's, which holds ``local/``.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.head_path = folder / LEDGER_FILE, folder / HEAD_FILE
        self.id = ""
        self._unfinished: str | None = None
        self._forget(-1)

    @contextmanager
    def locked(self) -> Iterator["Ledger"]:
        """Holds off every other writer, of this process and others; what they wrote is known inside.

        Where there is no ledger yet, one begins.

        Raises:
            FedImagingError: the ledger was changed or cannot be written. It is not written on until somebody has
                looked: what cannot be written down does not leave.
        """
        try:
            file = os.fdopen(os.open(self.head_path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        except OSError as error:
            raise FedImagingError(f"{self.head_path}: can't be written: {error.strerror}", Reason.INTERNAL) from None
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self._catch_up()
            raw = file.read()
            self._head_file = file
            head = self._begin() if not raw and not self._lines else Head.parse(raw)
            if head is None or not self._whole or not head.fits(self._lines, self._before, self._last):
                raise FedImagingError(
                    f"{self.path}: the ledger was changed; see `ledger verify`, then move {LEDGER_FILE} and "
                    f"{HEAD_FILE} out of this folder and keep them; nothing leaves this site before, and grants of "
                    "rounds are void until they are given anew",
                    Reason.INTERNAL,
                )
            self.id = head.id
            self._unfinished = head.coming if head.coming != self._last else None
            yield self

    def rounds(self, grant: Grant) -> int | None:
        """How many rounds of a grant are used up; None if another ledger counted them."""
        return _count(grant, self.id, self._rounds)

    def append(self, entry: Entry) -> None:
        """Adds a line and waits until it is on the disk; call it inside :meth:`locked`.

        A line that a crash left unfinished is dropped, and the new one tells so.

        Raises:
            FedImagingError: it cannot be written. What was begun is taken back; where the disk refuses that too, a line
                may tell of a result that did not leave.
        """
        try:
            self._write(entry)
        except OSError as error:
            self._take_back()
            raise FedImagingError(f"{self.path}: can't be written: {error.strerror}", Reason.NO_DISK_SPACE) from None

    def _write(self, entry: Entry) -> None:
        created = not self.path.exists()
        with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
            line, record = self._line(entry, torn=file.seek(0, os.SEEK_END) - self._read_to)
            digest = hashlib.sha256(line).hexdigest()
            self._write_head(Head(self.id, self._lines, self._last, coming=digest))
            file.truncate(self._read_to)
            file.seek(self._read_to)
            _write_all(file, line)
            self._inode = os.fstat(file.fileno()).st_ino
        if created:
            _sync_folder(self.path.parent)
        self._write_head(Head(self.id, self._lines + 1, digest))
        self._take(line, record)
        self._unfinished = None

    def _take_back(self) -> None:
        """Brings file and head back to the last whole line, the file first: the head allows both until then."""
        try:
            if self.path.exists():
                with self.path.open("r+b", buffering=0) as file:
                    file.truncate(self._read_to)
                    os.fsync(file.fileno())
            self._write_head(Head(self.id, self._lines, self._last))
        except OSError as error:
            log.error("%s: a line that failed can't be taken back: %s", self.path, error.strerror)

    def _begin(self) -> Head:
        """The head of a new ledger; it belongs to whom the folder does, also where root gives the first grant."""
        head = Head(secrets.token_hex(_ID_BYTES))
        try:
            if os.geteuid() == 0:
                folder = self.path.parent.stat()
                os.fchown(self._head_file.fileno(), folder.st_uid, folder.st_gid)
            self._write_head(head)
            _sync_folder(self.path.parent)
        except OSError as error:
            with suppress(OSError):
                self._head_file.truncate(0)
            raise FedImagingError(
                f"{self.head_path}: can't be written: {error.strerror}", Reason.NO_DISK_SPACE
            ) from None
        return head

    def _write_head(self, head: Head) -> None:
        self._head_file.seek(0)
        _write_all(self._head_file, head.raw())

    def _line(self, entry: Entry, torn: int) -> tuple[bytes, dict[str, Any]]:
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **vars(entry),
            **({"dropped_bytes": torn} if torn else {}),
            **({"unfinished": self._unfinished} if self._unfinished else {}),
            "previous": self._last,
        }
        return json.dumps(record, allow_nan=False).encode() + b"\n", record

    def _catch_up(self) -> None:
        """Reads the lines that were added since."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._read_to:
                    self._forget(status.st_ino)
                file.seek(self._read_to)
                for line in file:
                    if line.endswith(b"\n"):
                        self._take(line, _parse(line))
        except FileNotFoundError:
            self._forget(-1)
        except OSError as error:
            raise FedImagingError(f"{self.path}: can't be read: {error.strerror}", Reason.INTERNAL) from None

    def _forget(self, inode: int) -> None:
        self._inode = inode
        self._whole: bool = True
        self._read_to: int = 0
        self._lines: int = 0
        self._before: str = START
        self._last: str = START
        self._rounds: Counter[str] = Counter()

    def _take(self, line: bytes, record: dict[str, Any]) -> None:
        self._whole = self._whole and record.get("previous") == self._last
        self._read_to += len(line)
        self._lines += 1
        self._before, self._last = self._last, hashlib.sha256(line).hexdigest()
        self._rounds.update(_grants_charged([record]))


def _parse(line: bytes) -> dict[str, Any]:
    """A line's record; empty if it is none, which ``verify`` tells."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _write_all(file: RawIOBase, data: bytes) -> None:
    """Writes whole and waits until it is on the disk."""
    if file.write(data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_lines(folder: Path) -> list[bytes]:
    """The whole lines of a site's ledger, none if there is no file; an unfinished last line is left out.

    Raises:
        FedImagingError: it cannot be read.
    """
    path = folder / LEDGER_FILE
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FedImagingError(f"{path}: can't be read: {error.strerror}") from None
    return raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Every record of a site's ledger, oldest first; damaged lines are left out, which :func:`verify` tells."""
    return [record for record in map(_parse, read_lines(folder)) if record]


def rounds_used(folder: Path) -> Callable[[Grant], int | None]:
    """Tells of a grant what :meth:`Ledger.rounds` does, without the lock."""
    used = Counter(_grants_charged(read_records(folder)))
    head = Head.parse(_read_head(folder))
    return lambda grant: _count(grant, head.id if head else None, used)


def _count(grant: Grant, ledger: str | None, used: Mapping[str, int]) -> int | None:
    return None if grant.rounds is not None and grant.ledger != ledger else used.get(grant.id, 0)


def _read_head(folder: Path) -> bytes:
    try:
        return (folder / HEAD_FILE).read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise FedImagingError(f"{folder / HEAD_FILE}: can't be read: {error.strerror}") from None


def _grants_charged(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return [str(r.get("grant")) for r in records if r.get("counts") is True and r.get("gate") == PASSED]


def verify(folder: Path) -> Check:
    """Checks each line against the hash in the next, and the last against ``ledger.head``."""
    raw, lines = _read_both(folder)
    faults: list[str] = []
    hashes = [START]
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if not record:
            faults.append(f"line {number}: no record")
        elif record.get("previous") != hashes[-1]:
            faults.append(
                f"line {number}: does not follow line {number - 1}; one of the two was changed, or lines "
                "between them were removed or reordered"
            )
        hashes.append(hashlib.sha256(line).hexdigest())
    count, head = len(lines), Head.parse(raw)
    if head is None:
        if lines or raw:
            faults.append(f"{HEAD_FILE}: missing or damaged; the last line cannot be checked")
        return Check(hashes[1:], faults)
    if head.lines > count:
        faults.append(f"{head.lines - count} lines at the end were removed")
    elif hashes[head.lines] != head.last:
        faults.append(f"line {head.lines}: changed; it was the last that {HEAD_FILE} knows")
    elif not head.fits(count, hashes[max(0, count - 1)], hashes[count]):
        faults.append(f"{count - head.lines} lines at the end were not written by this programme")
    return Check(hashes[1:], faults, unfinished=not faults and head.coming not in {None, hashes[-1]})


def _read_both(folder: Path) -> tuple[bytes, list[bytes]]:
    """The head and the lines as they are between two writes."""
    try:
        with (folder / HEAD_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            return file.read(), read_lines(folder)
    except FileNotFoundError:
        return b"", read_lines(folder)
    except OSError as error:
        raise FedImagingError(f"{folder / HEAD_FILE}: can't be read: {error.strerror}") from None
