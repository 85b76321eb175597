"""The ledger: one JSON line for each task that a site was given, in order, each with the hash of the one before.

``ledger.jsonl`` lies in the site's folder beside FLARE's logs, and ``ledger.head`` beside it: how many lines there are
and the SHA-256 of the last, so that an end that was cut off shows too. ``ledger.head`` is also the lock (flock) under
which lines of several jobs are written. A line is on the disk (fsync) before what it tells of leaves the site. The file
is not rotated: a line has under 1 kB, and a chain that starts anew would prove nothing.

The chain proves edits to whoever keeps an earlier head, for example in the log collector that ``ledger export`` feeds:
who can write the folder can write a new chain.
"""

import errno
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from fedimaging.errors import FedImagingError, Reason
from fedimaging.governance.grants import Kind

LEDGER_FILE: Final = "ledger.jsonl"
HEAD_FILE: Final = "ledger.head"
START: Final = "0" * 64
"""what the first line has as the hash of the one before"""
PASSED: Final = "passed"


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

    @property
    def lines(self) -> int:
        return len(self.hashes)

    @property
    def last(self) -> str:
        return self.hashes[-1] if self.hashes else START


class Ledger:
    """A site's ledger.

    Args:
        folder: the site's, which holds ``local/``.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self.head_path = folder / LEDGER_FILE, folder / HEAD_FILE
        self._forget(-1)

    @contextmanager
    def locked(self) -> Iterator["Ledger"]:
        """Holds off every other writer, of this process and others; what they wrote is known inside.

        Raises:
            FedImagingError: the ledger was changed or cannot be written. It is not written on until somebody has
                looked: what cannot be written down does not leave.
        """
        try:
            head = os.fdopen(os.open(self.head_path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")
        except OSError as error:
            raise FedImagingError(f"{self.head_path}: can't be written: {error.strerror}", Reason.INTERNAL) from None
        with head:
            fcntl.flock(head, fcntl.LOCK_EX)
            self._catch_up()
            known = _parse_head(head.read()) if os.fstat(head.fileno()).st_size else (0, START)
            if not self._whole or known not in ((self._lines, self._last), (self._lines - 1, self._before)):
                raise FedImagingError(
                    f"{self.path}: the ledger was changed; see `ledger verify`, then set {LEDGER_FILE} and {HEAD_FILE} "
                    "aside: until then nothing leaves this site",
                    Reason.INTERNAL,
                )
            self._head = head
            try:
                yield self
            finally:
                del self._head

    def rounds(self, grant: str) -> int:
        """How many rounds of a grant are used up."""
        return self._rounds[grant]

    def append(self, entry: Entry) -> None:
        """Adds a line and waits until it is on the disk; call it inside :meth:`locked`.

        A line that a crash left unfinished is dropped, and the new one tells how many bytes it had.

        Raises:
            FedImagingError: it cannot be written; then the file is as it was.
        """
        created = not self.path.exists()
        try:
            with os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0) as file:
                line, record = self._line(entry, torn=file.seek(0, os.SEEK_END) - self._read_to)
                file.truncate(self._read_to)
                file.seek(self._read_to)
                if file.write(line) != len(line):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
                self._inode = os.fstat(file.fileno()).st_ino
            if created:
                _sync_folder(self.path.parent)
            self._take(line, record)
            self._head.seek(0)
            self._head.write(json.dumps({"lines": self._lines, "last": self._last}).encode() + b"\n")
            self._head.truncate()
            self._head.flush()
            os.fsync(self._head.fileno())
        except OSError as error:
            raise FedImagingError(f"{self.path}: can't be written: {error.strerror}", Reason.NO_DISK_SPACE) from None

    def _line(self, entry: Entry, torn: int) -> tuple[bytes, dict[str, Any]]:
        record: dict[str, Any] = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            **vars(entry),
            **({"dropped_bytes": torn} if torn else {}),
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
        self._read_to, self._inode, self._lines, self._whole = 0, inode, 0, True
        self._before = self._last = START
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


def rounds_used(folder: Path) -> Counter[str]:
    """How many rounds of each grant are used up, by its id."""
    return Counter(_grants_charged(read_records(folder)))


def _grants_charged(records: Iterable[Mapping[str, Any]]) -> list[str]:
    return [str(r.get("grant")) for r in records if r.get("counts") is True and r.get("gate") == PASSED]


def verify(folder: Path) -> Check:
    """Checks each line against the hash in the next, and the last against ``ledger.head``."""
    faults: list[str] = []
    hashes = [START]
    for number, line in enumerate(read_lines(folder), start=1):
        record = _parse(line)
        if not record:
            faults.append(f"line {number}: no record")
        elif record.get("previous") != hashes[-1]:
            faults.append(
                f"line {number}: does not follow line {number - 1}; one of the two was changed, or lines "
                "between them were removed or reordered"
            )
        hashes.append(hashlib.sha256(line).hexdigest())
    lines = len(hashes) - 1
    try:
        head = _parse_head((folder / HEAD_FILE).read_bytes())
    except OSError:
        head = None
    if head is None:
        if lines:
            faults.append(f"{HEAD_FILE}: missing or damaged; the last line cannot be checked")
    elif head[0] > lines:
        faults.append(f"{head[0] - lines} lines at the end were removed")
    elif hashes[head[0]] != head[1]:
        faults.append(f"line {head[0]}: changed; it was the last that {HEAD_FILE} knows")
    elif head[0] < lines - 1:
        faults.append(f"{lines - head[0]} lines at the end were not written by this programme")
    return Check(hashes[1:], faults)


def _parse_head(raw: bytes) -> tuple[int, str] | None:
    try:
        head = json.loads(raw)
        lines, last = int(head["lines"]), str(head["last"])
    except (ValueError, TypeError, KeyError):
        return None
    return (lines, last) if lines >= 0 else None
