"""Grants: what a site's data owner allows, in ``local/grants.yml``. Without one, nobody may do anything.

    grants:
      - id: 3f9c2a
        dataset: chest_xray
        job: chest_xray_fedavg        # its name
        config: 5d0c...               # optional: SHA-256 of its configuration; another one is another job
        submitter: lead@example.org   # or role: lead
        kinds: [train, evaluate]
        rounds: 12                    # of training, counted in the ledger
        ledger: 8c1f2e90a4b7d356      # its id, written by `grant give`; another ledger, and the grant is void
        until: 2026-12-31             # the last day, UTC

``"*"`` stands for any dataset, job or submitter; without ``rounds`` or ``until`` there is no limit. A file that is
missing, unreadable, writable by everybody or wrong in any entry means no.
"""

import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from fedimaging.errors import FedImagingError, Reason

GRANTS_FILE: Final = "grants.yml"
ANY: Final = "*"

_HEADER = """\
# Who may do what with this site's data. It is yours: not signed, and nobody but you can change it.
# Written by `python -m fedimaging grant give` and `grant take`; what is not granted here is refused.
"""


class Kind(StrEnum):
    """What a job does with the data. No job asks for statistics alone: those of an evaluation are part of it."""

    TRAIN = "train"
    EVALUATE = "evaluate"


JobName = Annotated[str, StringConstraints(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9_.-]{0,63})$")]
DatasetName = Annotated[str, StringConstraints(pattern=r"^(\*|[A-Za-z0-9][A-Za-z0-9._-]{0,127})$")]
Person = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f\x7f]+$")]


class Grant(BaseModel):
    """One thing that is allowed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: Annotated[str, StringConstraints(pattern=r"^[a-z0-9-]{1,32}$")]
    dataset: DatasetName
    job: JobName
    config: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")] | None = None
    submitter: Person | None = None
    role: Person | None = None
    kinds: Annotated[list[Kind], Field(min_length=1)]
    rounds: Annotated[int, Field(ge=1, strict=True)] | None = None
    ledger: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16}$")] | None = None
    until: date | None = None

    @model_validator(mode="after")
    def _names_somebody(self) -> "Grant":
        if self.submitter is None and self.role is None:
            raise ValueError("names neither a submitter nor a role")
        return self

    @property
    def who(self) -> str:
        """To whom, for people to read."""
        if self.submitter not in {None, ANY}:
            return str(self.submitter)
        return f"any {self.role}" if self.role else "anybody"

    def expired(self, now: datetime) -> bool:
        return self.until is not None and now.astimezone(UTC).date() > self.until


@dataclass(frozen=True)
class Request:
    """What a task of a job asks of the site's data.

    Args:
        job: the job's name, as the server says it.
        config: SHA-256 of the job's configuration for sites, as it was deployed; see :func:`config_hash`.
        submitter: who submitted it, empty for nobody.
        role: the submitter's.
        signed: whether the submitter's own signature on the job says who that is; else it is the server's word.
        counts: whether it uses up a round.
    """

    dataset: str
    job: str
    config: str
    submitter: str
    role: str
    signed: bool
    kind: Kind
    counts: bool


class NoConsentError(FedImagingError):
    """The data owner has not granted it. The server learns NO_CONSENT and nothing else."""

    def __init__(self, message: str) -> None:
        super().__init__(message, Reason.NO_CONSENT)


def decide(grants: Iterable[Grant], request: Request, used: Callable[[Grant], int | None], now: datetime) -> Grant:
    """The grant that allows a request.

    Args:
        used: how many rounds a grant has paid for already; None if another ledger counted them.

    Raises:
        NoConsentError: none does; the message says, at the site, how near the nearest came.
    """
    nearest, why = -1, f"no grant for the dataset {request.dataset}"
    for grant in grants:
        rounds = used(grant)
        steps = [
            (_fits(grant.dataset, request.dataset), f"no grant for the dataset {request.dataset}"),
            (_fits(grant.job, request.job), f"no grant for the job {request.job}"),
            (grant.config in {None, request.config}, f"the grant {grant.id} is for another configuration of the job"),
            (_same_person(grant, request), f"the grant {grant.id} is for {grant.who}, {_not_them(grant, request)}"),
            (request.kind in grant.kinds, f"the grant {grant.id} is not for the kind {request.kind}"),
            (not grant.expired(now), f"the grant {grant.id} expired on {grant.until}"),
            (rounds is not None, f"the rounds of the grant {grant.id} are counted in another ledger; give it anew"),
            (
                not request.counts or grant.rounds is None or (rounds or 0) < grant.rounds,
                f"the {grant.rounds} rounds of the grant {grant.id} are used up",
            ),
        ]
        failed = next((i for i, (fits, _) in enumerate(steps) if not fits), None)
        if failed is None:
            return grant
        if failed > nearest:
            nearest, why = failed, steps[failed][1]
    raise NoConsentError(f"{why}; `python -m fedimaging grant show` says what the job asks for")


def _fits(wanted: str, said: str) -> bool:
    return wanted in {ANY, said}


def _same_person(grant: Grant, request: Request) -> bool:
    """A named submitter or role must be proven by a signature; the server could claim anybody."""
    if grant.submitter == ANY and grant.role is None:
        return True
    same = grant.submitter in {None, ANY, request.submitter} and grant.role in {None, request.role}
    return same and request.signed


def _not_them(grant: Grant, request: Request) -> str:
    if not request.signed:
        return "and the job bears no signature that says who submitted it"
    return f"not for {request.submitter or 'nobody'} ({request.role or 'no role'})"


def config_hash(raw: bytes) -> str:
    """SHA-256 of what a job's ``config_fed_client.json`` says: FLARE's own commands write it anew with other spaces.

    Raises:
        ValueError: it is no JSON.
    """
    said = json.dumps(json.loads(raw), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()


class GrantsFile:
    """``local/grants.yml``, read anew whenever it changed.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None
        self._grants: list[Grant] = []

    def stamp(self) -> tuple[int, ...] | None:
        """Changes with the file; None if there is none. Cheap enough for every batch."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_size, status.st_ino, status.st_mode)

    def grants(self) -> list[Grant]:
        """Raises NoConsentError if the file is missing, unreadable or wrong."""
        stamp = self.stamp()
        if stamp is None or stamp != self._stamp:
            self._grants = read_grants(self.path)
            self._stamp = stamp
        return self._grants


def read_grants(path: Path) -> list[Grant]:
    """Every grant of the file. Raises NoConsentError naming the entry at fault: a wrong file grants nothing."""
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read() if stat.S_ISREG(mode) else None
    except FileNotFoundError:
        raise NoConsentError(f"{path}: no such file, so nothing is granted; see `grant give`") from None
    except (OSError, UnicodeDecodeError):
        raise NoConsentError(f"{path}: can't be read, so nothing is granted") from None
    if text is None:
        raise NoConsentError(f"{path}: no regular file, so nothing is granted")
    if mode & stat.S_IWOTH:
        raise NoConsentError(f"{path}: everybody may write it, so nothing is granted; chmod o-w")
    try:
        content = yaml.safe_load(text)
        entries = content["grants"] or []
        if set(content) != {"grants"} or not isinstance(entries, list):
            raise TypeError
    except (yaml.YAMLError, TypeError, KeyError, RecursionError):
        raise NoConsentError(f"{path}: not a list under `grants:`, so nothing is granted") from None
    grants = [_parse(entry, f"{path}: grants[{i}]") for i, entry in enumerate(entries)]
    if len({grant.id for grant in grants}) < len(grants):
        raise NoConsentError(f"{path}: two grants have one id, so nothing is granted")
    return grants


def _parse(entry: Any, where: str) -> Grant:
    try:
        return Grant.model_validate(entry)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        name = ".".join([where, *map(str, first["loc"])])
        message = re.sub(r"\s+", " ", first["msg"]).removeprefix("Value error, ")
        raise NoConsentError(f"{name}: {message}, so nothing is granted") from None


def write_grants(path: Path, grants: Iterable[Grant]) -> None:
    """Replaces the file whole, keeping who may read it."""
    entries = [grant.model_dump(mode="json", exclude_none=True) for grant in grants]
    text = _HEADER + yaml.safe_dump({"grants": entries}, sort_keys=False)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        mode = stat.S_IMODE(path.stat().st_mode) & ~stat.S_IWOTH if path.exists() else 0o644
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise FedImagingError(f"{path}: can't be written: {error.strerror}") from None


def new_id(grants: Iterable[Grant]) -> str:
    """An id that no grant has, and none that was taken back is likely to have had: the ledger counts by it."""
    taken = {grant.id for grant in grants}
    return next(name for name in iter(lambda: secrets.token_hex(4), "") if name not in taken)


def grant_everything(local: Path, datasets: Iterable[str]) -> None:
    """Writes a grant of everything for anybody on these datasets: for synthetic data, in the simulator and POC.

    Args:
        local: the site's ``local`` folder.
        datasets: logical names, as in ``datasets.yml``.
    """
    grants = [
        Grant(id=f"own-machine-{i}", dataset=name, job=ANY, submitter=ANY, kinds=[Kind.TRAIN, Kind.EVALUATE])
        for i, name in enumerate(sorted(datasets))
    ]
    write_grants(local / GRANTS_FILE, grants)
