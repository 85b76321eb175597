"""The server's check of the revocation list, with FLARE's messages and without its network."""

from datetime import UTC, datetime
from types import SimpleNamespace

import pytest
from cryptography import x509
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.fuel.f3.cellnet.defs import IdentityChallengeKey, MessageHeaderKey, MessagePropKey, MessageType, ReturnCode
from nvflare.fuel.f3.endpoint import Endpoint
from nvflare.fuel.f3.message import Message
from nvflare.lighter.entity import participant_from_dict
from nvflare.lighter.utils import serialize_cert
from nvflare.private.defs import CellChannel, CellMessageHeaderKeys

from fedimaging.errors import FedImagingError
from fedimaging.federation.policy import ALLOWED_CLASSES
from fedimaging.federation.revocation import RevocationCheck, Revocations
from provisioning.builders import sign_certificate
from provisioning.keys import Keys, Revoked, new_rsa_key

SINCE = datetime.now(UTC).isoformat()
REMOVED = Revoked("a1", "hospital-b", SINCE, removed=True)
SUPERSEDED = Revoked("b2", "hospital-a", SINCE, removed=False)


@pytest.fixture(scope="module")
def keys():
    return Keys.make("fedimaging", 3650)


@pytest.fixture(scope="module")
def certificate(keys):
    entry = participant_from_dict({"name": "hospital-a", "type": "client", "org": "hospital_a"})
    return sign_certificate(entry, new_rsa_key().public_key(), keys.root, keys.root_key, 30)


class Server:
    """What the check sees of FLARE's server."""

    def __init__(self):
        self.filters, self.request_filters, self.logged_out, self.closed, self.ended = [], [], [], [], []
        self.connections = {}
        core_cell = SimpleNamespace(
            agents={},
            communicator=SimpleNamespace(
                conn_manager=SimpleNamespace(get_connections=self.connections.get), remove_endpoint=self.closed.append
            ),
            add_incoming_filter=lambda channel, topic, cb: self.filters.append(cb),
            add_incoming_request_filter=lambda channel, topic, cb: self.request_filters.append(cb),
        )
        self.core_cell = core_cell
        clients = {
            f"token of {name}": SimpleNamespace(name=name, get_fqcn=lambda name=name: name)
            for name in ("hospital-a", "hospital-b")
        }
        self.client_manager = SimpleNamespace(get_clients=lambda: clients)
        sessions = [SimpleNamespace(user_name="lead@example.org", sess_id="s1", origin_fqcn="_admin_x")]
        self.admin_server = SimpleNamespace(
            sess_mgr=SimpleNamespace(
                get_sessions=lambda: sessions, end_session_by_id=lambda *said: self.ended.append(said)
            )
        )

    def get_cell(self):
        return SimpleNamespace(core_cell=self.core_cell)

    def logout_client(self, token):
        self.logged_out.append(token)


@pytest.fixture
def guarded(keys, tmp_path, monkeypatch):
    """A server with the check in place, which reads its list when told and not by the clock."""
    monkeypatch.setattr(RevocationCheck, "_watch", lambda self: None)
    server, check, path = Server(), RevocationCheck(str(tmp_path / "storage")), tmp_path / "revoked.crl"

    def publish(number, *entries):
        path.write_bytes(keys.revocation_list(number, entries))
        return check.check_list()

    path.write_bytes(keys.revocation_list(0, ()))
    check.guard(server, path, keys.root)
    return SimpleNamespace(server=server, check=check, path=path, publish=publish)


def message(endpoint="hospital-b", destination="server", channel=CellChannel.SERVER_MAIN, payload=None, **headers):
    made = Message(headers, payload)
    made.set_header(MessageHeaderKey.DESTINATION, destination)
    made.set_header(MessageHeaderKey.MSG_TYPE, MessageType.REQ)
    made.set_header(MessageHeaderKey.CHANNEL, channel)
    made.set_header(MessageHeaderKey.ORIGIN, endpoint)
    made.set_prop(MessagePropKey.ENDPOINT, Endpoint(endpoint))
    return made


def over_tls(pem):
    """A gRPC connection, as FLARE keeps it, of a peer with this certificate."""
    return SimpleNamespace(conn=SimpleNamespace(context=SimpleNamespace(auth_context=lambda: {"x509_pem_cert": [pem]})))


def passes(guarded, sent):
    """Whether both of the check's filters let a message pass."""
    return not any(cb(sent) for cb in (*guarded.server.filters, *guarded.server.request_filters))


def test_a_list_says_who_was_removed_and_which_certificates_are_revoked(keys, tmp_path):
    path = tmp_path / "revoked.crl"
    path.write_bytes(keys.revocation_list(7, [REMOVED, SUPERSEDED]))
    expected = Revocations(7, frozenset({"hospital-b"}), {0xA1: "hospital-b", 0xB2: "hospital-a"})
    assert Revocations.read(path, keys.root) == expected


def test_a_list_of_another_root_or_a_damaged_one_is_none(keys, tmp_path):
    path = tmp_path / "revoked.crl"
    with pytest.raises(FedImagingError, match="can't read"):
        Revocations.read(path, keys.root)
    path.write_bytes(Keys.make("fedimaging", 30).revocation_list(7, [REMOVED]))
    with pytest.raises(FedImagingError, match="not signed by this federation's root"):
        Revocations.read(path, keys.root)
    good = keys.revocation_list(7, [REMOVED])
    for bad in (b"", good[:200], good.replace(b"MII", b"MIJ", 1)):
        path.write_bytes(bad)
        with pytest.raises(FedImagingError, match="damaged"):
            Revocations.read(path, keys.root)


def test_no_job_may_name_the_check():
    assert "fedimaging.federation.revocation.RevocationCheck" not in ALLOWED_CLASSES


def test_an_empty_list_lets_everybody_pass(guarded):
    assert passes(guarded, message())


@pytest.mark.parametrize(
    "sent",
    [
        message(),
        message("hospital-b.job-1", "server.job-1"),
        message("_admin_x", **{CellMessageHeaderKeys.CLIENT_NAME: "hospital-b"}),
        message("somebody", **{IdentityChallengeKey.COMMON_NAME: "hospital-b"}),
        message("hospital-a", "hospital-b"),
        message("server.job-1", "hospital-b.job-1"),
        message(channel=CellChannel.AUX_COMMUNICATION),
    ],
    ids=["itself", "its job", "its token", "its claim", "a peer to it", "a job to it", "another channel"],
)
def test_nothing_from_or_to_a_removed_participant_passes(guarded, sent):
    assert passes(guarded, sent)
    assert guarded.publish(1, REMOVED)
    assert not passes(guarded, sent)
    assert passes(guarded, message("hospital-a"))


def test_a_removed_user_is_known_by_the_certificate_of_the_connection(guarded):
    guarded.publish(1, Revoked("c3", "lead@example.org", SINCE, removed=True))
    sent = message("_admin_x")
    assert passes(guarded, sent)
    sent.set_prop(MessagePropKey.COMMON_NAME, "lead@example.org")
    assert not passes(guarded, sent)


def test_who_registers_or_logs_in_is_told_why_and_the_rest_is_dropped(guarded):
    guarded.publish(1, REMOVED)
    for channel in (CellChannel.SERVER_MAIN, CellChannel.HCI):
        sent = message(channel=channel)
        assert not guarded.server.filters[0](sent)
        answer = guarded.server.request_filters[0](sent)
        assert answer.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.UNAUTHENTICATED
        assert answer.get_header(MessageHeaderKey.ERROR) == "hospital-b was removed from this federation"
    assert guarded.server.filters[0](message("hospital-b.job", "server.job"))


def test_a_superseded_certificate_is_refused_wherever_it_is_shown(guarded, certificate):
    pem = serialize_cert(certificate)
    shown = [
        message("hospital-a", payload={IdentityChallengeKey.CERT: pem}),
        message("_admin_x", channel=CellChannel.HCI, cert=pem),
    ]
    assert all(passes(guarded, sent) for sent in shown)
    guarded.publish(1, Revoked(f"{certificate.serial_number:x}", "hospital-a", SINCE, removed=False))
    assert not any(passes(guarded, sent) for sent in shown)
    assert passes(guarded, message("hospital-a", payload={IdentityChallengeKey.CERT: b"none"}))
    guarded.server.connections["hospital-a"] = [over_tls(pem)]
    assert not passes(guarded, message("hospital-a"))
    guarded.check._log_out()
    assert guarded.server.logged_out == ["token of hospital-a"]


def test_without_a_list_at_start_nobody_passes_until_there_is_one(keys, guarded, tmp_path, caplog):
    server, check = Server(), RevocationCheck(str(tmp_path / "storage"))
    path = tmp_path / "later.crl"
    check.guard(server, path, keys.root)
    fresh = SimpleNamespace(server=server)
    assert not passes(fresh, message("hospital-a"))
    assert passes(fresh, message("server.job-1", "server"))
    path.write_bytes(keys.revocation_list(3, ()))
    assert check.check_list()
    assert passes(fresh, message("hospital-a"))


@pytest.mark.parametrize("how", ["deleted", "damaged", "another root's", "older"])
def test_a_list_that_went_wrong_leaves_the_one_before_in_force(guarded, keys, how, caplog):
    guarded.publish(5, REMOVED)
    if how == "deleted":
        guarded.path.unlink()
    else:
        contents = {
            "damaged": b"nothing",
            "another root's": Keys.make("fedimaging", 30).revocation_list(9, ()),
            "older": keys.revocation_list(4, ()),
        }
        guarded.path.write_bytes(contents[how])
    with caplog.at_level("ERROR"):
        assert not guarded.check.check_list()
        assert not guarded.check.check_list()
    assert ["list 5 still holds" in record.message for record in caplog.records] == [True]
    assert not passes(guarded, message())
    assert guarded.publish(6)
    assert passes(guarded, message())


def restarted(guarded, keys, storage):
    """The server after a restart, with the list that lies there now."""
    server, check = Server(), RevocationCheck(str(storage))
    check.guard(server, guarded.path, keys.root)
    return SimpleNamespace(server=server, check=check)


def test_an_older_list_that_a_backup_brings_back_lets_nobody_in_after_a_restart(guarded, keys, tmp_path, caplog):
    guarded.publish(4)
    older = guarded.path.read_bytes()
    guarded.publish(5, REMOVED)
    guarded.path.write_bytes(older)
    fresh = restarted(guarded, keys, tmp_path / "storage")
    assert not passes(fresh, message())
    assert "list 4 is older than list 5, which was here; everybody is refused" in caplog.text
    guarded.path.write_bytes(keys.revocation_list(5, [REMOVED]))
    assert fresh.check.check_list()
    assert not passes(fresh, message())
    assert passes(fresh, message("hospital-a"))


def test_a_number_that_cannot_be_read_is_not_taken_as_none(guarded, keys, tmp_path):
    guarded.publish(5, REMOVED)
    for path in (tmp_path / "storage").iterdir():
        path.write_text("")
    with pytest.raises(FedImagingError, match="can't read the number of the last revocation list"):
        restarted(guarded, keys, tmp_path / "storage")
    assert passes(restarted(guarded, keys, tmp_path / "of another federation"), message("hospital-a"))


def test_a_list_holds_also_where_its_number_cannot_be_kept(guarded, tmp_path, caplog):
    (tmp_path / "storage").write_text("no folder")
    guarded.publish(5, REMOVED)
    assert not passes(guarded, message())
    assert "after a restart an older list would hold" in caplog.text


def test_sites_are_logged_out_sessions_ended_and_connections_closed(guarded):
    guarded.server.core_cell.agents = {
        name: SimpleNamespace(endpoint=Endpoint(name, conn_props={"peer_cn": common_name}))
        for name, common_name in (
            ("hospital-a", "hospital-a"), ("hospital-b", "hospital-b"), ("hospital-b.job-1", "hospital-b"),
            ("_admin_x", "lead@example.org"), ("server.job-1", None),
        )
    }  # fmt: skip
    guarded.publish(1, REMOVED, Revoked("c3", "lead@example.org", SINCE, removed=True))
    guarded.check._log_out()
    guarded.check._disconnect()
    assert guarded.server.logged_out == ["token of hospital-b"]
    assert guarded.server.ended == [("s1", "lead@example.org was removed from this federation")]
    assert guarded.server.closed == ["hospital-b", "hospital-b.job-1", "_admin_x"]


def test_a_removed_user_s_waiting_jobs_are_not_scheduled(guarded):
    guarded.publish(1, Revoked("c3", "lead@example.org", SINCE, removed=True))
    context = FLContext()
    for submitter, reason in (("lead@example.org", "lead@example.org was removed from this federation"), ("x", None)):
        context.set_prop(FLContextKey.JOB_META, {"submitter_name": submitter}, private=True, sticky=False)
        guarded.check.handle_event(EventType.BEFORE_CHECK_CLIENT_RESOURCES, context)
        assert context.get_prop(FLContextKey.JOB_BLOCK_REASON) == reason


def test_a_serial_in_hexadecimal_is_the_certificate_s_own(keys, certificate, tmp_path):
    (tmp_path / "revoked.crl").write_bytes(
        keys.revocation_list(1, [Revoked(f"{certificate.serial_number:x}", "hospital-a", SINCE, removed=True)])
    )
    crl = x509.load_pem_x509_crl((tmp_path / "revoked.crl").read_bytes())
    assert crl.get_revoked_certificate_by_serial_number(certificate.serial_number) is not None
