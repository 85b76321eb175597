"""A site's word on one running job: its grants asked, its ledger kept, for each task from its start to what left."""

import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Final

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import JobMetaKey
from nvflare.app_common.app_constant import AppConstants
from nvflare.lighter.tool_consts import NVFLARE_SIG_FILE
from nvflare.lighter.utils import verify_folder_signature_and_get_signers

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.protocol import CLIENT_CONFIG
from fedimaging.governance.grants import GRANTS_FILE, Grant, GrantsFile, Kind, NoConsentError, Request, config_hash
from fedimaging.governance.grants import decide as find_grant
from fedimaging.governance.ledger import PASSED, Entry, Ledger
from fedimaging.tasks.statistics import Groups
from fedimaging.training.declared import DeclaredResult

log = logging.getLogger(__name__)

KINDS: Final = {
    AppConstants.TASK_TRAIN: Kind.TRAIN,
    AppConstants.TASK_SUBMIT_MODEL: Kind.TRAIN,
    AppConstants.TASK_VALIDATION: Kind.EVALUATE,
}
"""the tasks that a site knows, by what they do with its data"""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LARGEST_ROUND = 2**31
_TASK = re.compile(r"[A-Za-z0-9_]{1,32}")


@dataclass(frozen=True)
class JobFacts:
    """What is known of a running job, and by whom.

    Args:
        name: as the server says it; a submitter's signature does not cover it.
        config: SHA-256 of the configuration as it was deployed.
        submitter: from the certificate that signed the deployed folder, whose chain ends at the kit's root; without a
            signature (``signed`` false) as the server says it.
    """

    job_id: str
    name: str
    config: str
    dataset: str
    submitter: str
    role: str
    signed: bool

    @classmethod
    def read(cls, fl_ctx: FLContext, dataset: str) -> "JobFacts":
        workspace, job_id = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT), fl_ctx.get_job_id()
        app = Path(workspace.get_app_dir(job_id))
        meta = fl_ctx.get_prop(FLContextKey.JOB_META) or {}
        signers = []
        if (app / NVFLARE_SIG_FILE).exists():
            _, signers = verify_folder_signature_and_get_signers(
                str(app), workspace.get_file_path_in_startup("rootCA.pem")
            )
        said = (meta.get(JobMetaKey.SUBMITTER_NAME), "", meta.get(JobMetaKey.SUBMITTER_ROLE))
        # Certificates of sites chain to the root too; those of people name a role.
        signed = len(signers) == 1 and bool(signers[0][2])
        submitter, _, role = signers[0] if signed else said
        config = Path(workspace.get_app_config_dir(job_id)) / CLIENT_CONFIG
        return cls(
            job_id=str(job_id),
            name=_clean(meta.get(JobMetaKey.JOB_NAME), _NAME),
            config=config_hash(config.read_bytes()),
            dataset=_clean(dataset, _NAME),
            submitter=_printable(submitter),
            role=_printable(role),
            signed=signed,
        )


class TaskInHand:
    """One task, from its arrival until its line in the ledger is written, which is once.

    Args:
        entry: what the line will say.
    """

    def __init__(self, entry: Entry, request: Request | None, grants: GrantsFile, ledger: Ledger) -> None:
        self.entry = entry
        self.closed = False
        self._request, self._grants, self._ledger = request, grants, ledger
        self._grant: Grant | None = None
        self._stamp: tuple[int, ...] | None = None
        self._started = time.monotonic()

    def ask(self) -> None:
        """Asks the grants. Raises NoConsentError where none allows the task."""
        with self._ledger.locked() as ledger:
            self._decide(ledger.rounds)

    def check(self) -> None:
        """Asks again if the grants file changed or the grant's last day is over; cheap enough for every batch."""
        grant = self._grant
        if grant is None or self._grants.stamp() != self._stamp or grant.expired(datetime.now(UTC)):
            self.ask()

    def release(self, cases: int | None, size: int, sha256: str) -> None:
        """Writes down that a result leaves, if the grants still allow it. After this it may go.

        Asking and writing are one step for all jobs of the site: two cannot use the same last round.

        Raises:
            NoConsentError: consent was taken back meanwhile; that is written down instead.
            FedImagingError: it cannot be written down.
        """
        with self._ledger.locked() as ledger:
            try:
                self._decide(ledger.rounds)
            except NoConsentError:
                self._write(ledger, "kept back: no consent any more")
                raise
            self.entry.cases, self.entry.bytes_out, self.entry.sha256 = cases, size, sha256
            self._write(ledger, PASSED)

    def close(self, gate: str) -> None:
        """Writes down that nothing left, and why."""
        if not self.closed:
            try:
                with self._ledger.locked() as ledger:
                    self._write(ledger, gate)
            except FedImagingError as error:
                # Nothing leaves, so nothing is owed to the ledger that its own state does not explain.
                self.closed = True
                log.error("not in the ledger: %s (%s)", error, gate)

    def _decide(self, used: Callable[[Grant], int | None]) -> None:
        if self._request is None:
            return
        # The stamp of before: what changes while it is read is seen at the next check.
        self._stamp = self._grants.stamp()
        try:
            self._grant = find_grant(self._grants.grants(), self._request, used, datetime.now(UTC))
        except NoConsentError as error:
            self._grant = None
            self.entry.consent = "refused: " + str(error).partition(";")[0]
            raise
        self.entry.consent, self.entry.grant = "granted", self._grant.id

    def _write(self, ledger: Ledger, gate: str) -> None:
        self.entry.gate, self.entry.seconds = gate, round(time.monotonic() - self._started, 3)
        ledger.append(self.entry)
        self.closed = True


class Custody:
    """The site's word on one job; the executor opens a task of it and the gate closes it.

    Args:
        site: the site's name.
        folder: the site's, with ``local/``; the ledger lies in it.
        local: where the grants are.
        job: whose tasks they are.
        declare: gives what the job's results may hold; asked once, at the first result.
        groups: gives the subgroups of the site's own cases.
    """

    current: "ClassVar[Custody | None]" = None

    def __init__(
        self,
        *,
        site: str,
        folder: Path,
        local: Path,
        job: JobFacts,
        declare: Callable[[], DeclaredResult],
        groups: Callable[[], Groups],
    ) -> None:
        self.job, self.groups = job, groups
        self.task: TaskInHand | None = None
        self._site, self._declare = site, declare
        self._declared: DeclaredResult | None = None
        self._grants, self._ledger = GrantsFile(local / GRANTS_FILE), Ledger(folder)

    @property
    def declared(self) -> DeclaredResult:
        if self._declared is None:
            self._declared = self._declare()
        return self._declared

    def open(self, task: str, round_number: object) -> TaskInHand:
        """Takes a task in hand; one that was not closed is written down as lost."""
        self.close_unfinished("never reached the gate")
        job, kind = self.job, KINDS.get(task)
        counts = task == AppConstants.TASK_TRAIN
        entry = Entry(
            site=self._site,
            job_id=job.job_id,
            job=job.name,
            config=job.config,
            submitter=job.submitter,
            role=job.role,
            signed=job.signed,
            dataset=job.dataset,
            task=_clean(task, _TASK),
            kind=kind,
            round=round_number if type(round_number) is int and 0 <= round_number < _LARGEST_ROUND else None,
            counts=counts,
        )
        request = (
            Request(job.dataset, job.name, job.config, job.submitter, job.role, job.signed, kind, counts)
            if kind is not None
            else None
        )
        self.task = TaskInHand(entry, request, self._grants, self._ledger)
        return self.task

    def close_unfinished(self, why: str) -> None:
        if self.task is not None:
            self.task.close(why)


def unknown_task() -> FedImagingError:
    return FedImagingError(
        f"the server asks for a task that this site does not know; it knows {', '.join(KINDS)}", Reason.UNKNOWN_TASK
    )


def _clean(value: object, pattern: re.Pattern[str]) -> str:
    """A name from outside as it may stand in the ledger."""
    return value if isinstance(value, str) and pattern.fullmatch(value) else "?"


def _printable(value: object) -> str:
    return value if isinstance(value, str) and value.isprintable() and len(value) <= 128 else ""
