"""The server refuses removed participants and revoked certificates. FLARE itself reads no revocation list.

The list is an X.509 CRL (RFC 5280), signed by the federation's root, in the server's ``local/revoked.crl``. It is read
again whenever it changes, without a restart.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.job_def import JobMetaKey
from nvflare.fuel.f3.cellnet.core_cell import make_reply
from nvflare.fuel.f3.cellnet.defs import IdentityChallengeKey, MessageHeaderKey, MessagePropKey, MessageType, ReturnCode
from nvflare.fuel.f3.cellnet.fqcn import FQCN
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.private.defs import CellChannel, CellMessageHeaderKeys

from fedimaging.errors import FedImagingError

REVOCATION_LIST = "revoked.crl"
ROOT_CERTIFICATE = "rootCA.pem"

_PARTICIPANT = x509.ObjectIdentifier("2.25.30134365073322285665391396655223700306")
"""entry extension: whose certificate it is, as DER UTF8String; an identifier of the UUID arc"""
_REMOVED = x509.ReasonFlags.cessation_of_operation
_UTF8_STRING = 0x0C
_MAX_NAME_BYTES = 127
_CHECK_SECONDS = 2.0
_PARTING_SECONDS = 1.0
_ANSWERED = {CellChannel.SERVER_MAIN, CellChannel.HCI}


def removed(name: str) -> list[x509.ExtensionType]:
    """A list entry's extensions that say: this participant is gone, whatever certificate it shows."""
    return [x509.CRLReason(_REMOVED), _participant_extension(name)]


def superseded(name: str) -> list[x509.ExtensionType]:
    """A list entry's extensions that say: this certificate counts no more, the participant stays."""
    return [x509.CRLReason(x509.ReasonFlags.superseded), _participant_extension(name)]


def _participant_extension(name: str) -> x509.UnrecognizedExtension:
    raw = name.encode()
    if len(raw) > _MAX_NAME_BYTES:
        raise ValueError(f"the name {name!r} is too long for a revocation list")
    return x509.UnrecognizedExtension(_PARTICIPANT, bytes([_UTF8_STRING, len(raw)]) + raw)


@dataclass(frozen=True)
class Revocations:
    """What a revocation list says.

    Args:
        number: of the list; each new one has a higher number.
        names: removed participants.
        serials: of revoked certificates, and whose they are.
    """

    number: int
    names: frozenset[str] = frozenset()
    serials: dict[int, str] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, root: x509.Certificate) -> Revocations:
        """Reads a list. Raises FedImagingError if it is missing, damaged, or not signed by this root."""
        try:
            crl = x509.load_pem_x509_crl(path.read_bytes())
            if crl.issuer != root.subject or not crl.is_signature_valid(root.public_key()):  # type: ignore[arg-type]
                raise FedImagingError(f"{path}: the revocation list is not signed by this federation's root")
            number = crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number
            entries = [(entry.serial_number, *_read_entry(entry)) for entry in crl]
        except OSError as error:
            raise FedImagingError(f"{path}: can't read the revocation list: {error.strerror}") from None
        except (ValueError, x509.ExtensionNotFound):
            raise FedImagingError(f"{path}: no revocation list, or a damaged one") from None
        names = frozenset(name for _, name, is_removed in entries if is_removed)
        return cls(number, names, {serial: name for serial, name, _ in entries})

    def refusal(self, names: set[str], serials: set[int]) -> str | None:
        """Why someone who goes by these names or certificates is refused; None if they are not."""
        for name in sorted(names & self.names):
            return f"{name} was removed from this federation"
        for serial in sorted(serials & self.serials.keys()):
            return f"the certificate {serial:x} of {self.serials[serial]} was revoked"
        return None


def _read_entry(entry: x509.RevokedCertificate) -> tuple[str, bool]:
    raw: bytes = entry.extensions.get_extension_for_oid(_PARTICIPANT).value.value  # type: ignore[attr-defined]
    if raw[0] != _UTF8_STRING or raw[1] != len(raw) - 2:
        raise ValueError("not a participant's name")
    reason = entry.extensions.get_extension_for_class(x509.CRLReason).value.reason
    return raw[2:].decode(), reason == _REMOVED


class RevocationCheck(FLComponent):
    """A component of the server: refuses what the revocation list names, on every message, and shows it the door.

    - Who registers or logs in with a revoked certificate, or under a removed name, gets the reason as the answer.
    - Every other message from a removed participant, or to it through the server, is dropped: that of its running
      jobs and of open consoles too, whatever token it holds.
    - Within seconds of a new list a site that it names is logged out, so that jobs know that it is gone; the session of
      such a user ends; the connections of both are closed.
    - Waiting jobs of a removed user are not scheduled. Running ones go on: who wants that ended aborts them.

    Without a valid list at start nobody is let in until there is one. If a list that was read once is damaged, deleted
    or replaced by an older one, the one read before holds. Both are said in the log as errors. The highest number of a
    list is kept with the server's jobs: an older list that a backup brings back does not let anybody in again.

    Args:
        storage: the folder of the server's state, outside its kit.
    """

    def __init__(self, storage: str) -> None:
        super().__init__()
        self._storage = Path(storage)
        self._highest = 0
        self._list: Revocations | None = None
        self._path = Path()
        self._root: x509.Certificate | None = None
        self._server: Any = None
        self._seen: tuple[int, int, int] | None = None
        self._told: set[str] = set()
        self._stop = threading.Event()

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type == EventType.SYSTEM_BOOTSTRAP:
            try:
                workspace = fl_ctx.get_prop(FLContextKey.WORKSPACE_OBJECT)
                root = Path(workspace.get_file_path_in_startup(ROOT_CERTIFICATE)).read_bytes()
                path = Path(workspace.get_site_config_dir()) / REVOCATION_LIST
                self.guard(fl_ctx.get_prop(FLContextKey.SITE_OBJ), path, x509.load_pem_x509_certificate(root))
            except Exception as error:  # FLARE passes over all but this one: a server without the check must not run
                raise UnsafeComponentError(f"the revocation check can't start: {error}") from error
        elif event_type == EventType.BEFORE_CHECK_CLIENT_RESOURCES:
            self._block_job(fl_ctx)
        elif event_type == EventType.SYSTEM_END:
            self._stop.set()

    def guard(self, server: Any, path: Path, root: x509.Certificate) -> None:
        """Starts to check every message of a FLARE server against the list at ``path``, which ``root`` signed."""
        self._server, self._path, self._root = server, path, root
        self._highest = self._read_highest()
        core_cell = server.get_cell().core_cell
        core_cell.add_incoming_filter(channel="*", topic="*", cb=self._drop)
        core_cell.add_incoming_request_filter(channel="*", topic="*", cb=self._refuse)
        self.check_list()
        threading.Thread(target=self._watch, name="revocation", daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(_CHECK_SECONDS):
            try:
                if self.check_list():
                    self._log_out()
                    self._stop.wait(_PARTING_SECONDS)
                    self._disconnect()
                else:
                    self._log_out()
            except Exception as error:  # the check must not end with one failure
                self.logger.error(f"the revocation check failed, and is tried again: {type(error).__name__}: {error}")

    def check_list(self) -> bool:
        """Reads the list if its file has changed. Returns whether another list holds now."""
        assert self._root is not None
        try:
            info = self._path.stat()
            seen = (info.st_mtime_ns, info.st_size, info.st_ino)
            if seen == self._seen:
                return False
            new = Revocations.read(self._path, self._root)
            self._seen = seen
        except OSError as error:
            self._say_broken(f"{self._path}: can't read the revocation list: {error.strerror}")
            return False
        except FedImagingError as error:
            self._say_broken(str(error))
            return False
        if new.number < self._highest:
            self._say_broken(f"{self._path}: list {new.number} is older than list {self._highest}, which was here")
            return False
        self._list, self._told = new, set()
        self._keep_highest(new.number)
        self.logger.info(
            f"revocation list {new.number}: {len(new.names)} removed participants, {len(new.serials)} certificates"
        )
        return True

    def _number_file(self) -> Path:
        assert self._root is not None
        return self._storage / f"revocations-{self._root.fingerprint(hashes.SHA256()).hex()[:16]}.number"

    def _read_highest(self) -> int:
        path = self._number_file()
        try:
            return int(path.read_text())
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise FedImagingError(
                f"{path}: can't read the number of the last revocation list ({error}); write it there, as `python -m "
                "provisioning status` says it"
            ) from None

    def _keep_highest(self, number: int) -> None:
        if number <= self._highest:
            return
        self._highest = number
        path = self._number_file()
        part = path.with_name(f".{path.name}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("w") as file:
                file.write(f"{number}\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except OSError as error:
            self._tell_once(f"{path}: can't be written: {error.strerror}; after a restart an older list would hold")

    def _say_broken(self, what: str) -> None:
        holds = f"list {self._list.number} still holds" if self._list else "everybody is refused until it is there"
        self._tell_once(f"{what}; {holds}; copy {REVOCATION_LIST} from the project admin")

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self.logger.error(text)

    def _refusal(self, message: Message) -> str | None:
        if self._list is not None and not self._list.serials:
            return None
        endpoint: Endpoint = message.get_prop(MessagePropKey.ENDPOINT)
        if FQCN.split(endpoint.name)[0] == FQCN.ROOT_SERVER:
            destination = FQCN.split(message.get_header(MessageHeaderKey.DESTINATION))[0]
            return self._list.refusal({destination}, set()) if self._list else None
        if self._list is None:
            return "the server has no valid revocation list; its log says more"
        names = {
            FQCN.split(endpoint.name)[0],
            FQCN.split(message.get_header(MessageHeaderKey.DESTINATION))[0],
            message.get_prop(MessagePropKey.COMMON_NAME),
            message.get_header(CellMessageHeaderKeys.CLIENT_NAME),
            message.get_header(IdentityChallengeKey.COMMON_NAME),
        }
        return self._list.refusal(names, set(self._serials(endpoint, message)))

    def _serials(self, endpoint: Endpoint, message: Message) -> Iterator[int]:
        """Of the certificates that a sender shows: over TLS, when it registers, and when a user logs in."""
        yield from _tls_serials(self._connections(endpoint.name))
        payload = message.payload if isinstance(message.payload, dict) else {}
        for shown in (payload.get(IdentityChallengeKey.CERT), message.get_header("cert")):
            if isinstance(shown, bytes):
                try:
                    yield x509.load_pem_x509_certificates(shown)[0].serial_number
                except ValueError:
                    continue  # no certificate: FLARE refuses it

    def _connections(self, endpoint: str) -> list[Any]:
        return self._server.get_cell().core_cell.communicator.conn_manager.get_connections(endpoint) or []

    def _drop(self, message: Message) -> Message | None:
        """An incoming filter: what it returns something for goes no further, and is not answered."""
        mine = message.get_header(MessageHeaderKey.DESTINATION) == FQCN.ROOT_SERVER
        request = message.get_header(MessageHeaderKey.MSG_TYPE) == MessageType.REQ
        if mine and request and message.get_header(MessageHeaderKey.CHANNEL) in _ANSWERED:
            return None
        return self._refuse(message)

    def _refuse(self, message: Message) -> Message | None:
        """An incoming request filter: what it returns is the answer."""
        why = self._refusal(message)
        if why is None:
            return None
        sender = message.get_header(CellMessageHeaderKeys.CLIENT_NAME) or message.get_header(MessageHeaderKey.ORIGIN)
        self._tell_once(f"refused messages of {sender}: {why}")
        return make_reply(ReturnCode.UNAUTHENTICATED, error=why)

    def _shut_out(self, name: str, endpoint: str) -> str | None:
        """Why this participant, and whoever else is connected as this endpoint, is no longer let in."""
        serials = set(_tls_serials(self._connections(endpoint)))
        return self._list.refusal({name}, serials) if self._list else None

    def _log_out(self) -> None:
        for token, client in list(self._server.client_manager.get_clients().items()):
            if why := self._shut_out(client.name, client.get_fqcn()):
                self._server.logout_client(token)
                self.logger.info(f"logged out {client.name}: {why}")
        sessions: Any = getattr(self._server.admin_server, "sess_mgr", None)
        for session in sessions.get_sessions() if sessions else ():
            if why := self._shut_out(session.user_name, session.origin_fqcn):
                sessions.end_session_by_id(session.sess_id, why)

    def _disconnect(self) -> None:
        core_cell = self._server.get_cell().core_cell
        for name, agent in list(core_cell.agents.items()):
            whose = agent.endpoint.conn_props.get("peer_cn") or FQCN.split(name)[0]
            if why := self._shut_out(whose, name):
                core_cell.communicator.remove_endpoint(name)
                self.logger.info(f"closed the connection of {name}: {why}")

    def _block_job(self, fl_ctx: FLContext) -> None:
        submitter = fl_ctx.get_prop(FLContextKey.JOB_META, {}).get(JobMetaKey.SUBMITTER_NAME.value)
        why = self._list.refusal({submitter}, set()) if self._list else None
        fl_ctx.set_prop(FLContextKey.JOB_BLOCK_REASON, why, private=True, sticky=False)


def _tls_serials(connections: list[Any]) -> Iterator[int]:
    """Serial numbers of the certificates that peers showed for gRPC connections."""
    for connection in connections:
        context = getattr(connection.conn, "context", None)
        for pem in context.auth_context().get("x509_pem_cert", ()) if context else ():
            yield x509.load_pem_x509_certificate(pem).serial_number
