"""What a site needs before it starts is told with its mend; the connection is tried as FLARE would make it."""

import shutil
import socket
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation import preflight
from fedimaging.federation.preflight import check, main, proxy_for
from tests.provisioning.conftest import make_federation, project_text


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory):
    return make_federation(tmp_path_factory.mktemp("strangers"), project_text()).folder / "kits"


@pytest.fixture
def kit(handed_over, tmp_path):
    return shutil.copytree(handed_over.kits / "hospital-a", tmp_path / "hospital-a")


def listen(answer):
    """A thread that answers one connection after the other until the listener is closed. Returns it and its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def work():
        while True:
            try:
                answer(listener.accept()[0])
            except ssl.SSLError:
                continue
            except OSError:
                return

    threading.Thread(target=work, daemon=True).start()
    return listener, listener.getsockname()[1]


def server_of(kits):
    """A TLS server with a kit's certificate that asks for the clients', and greets as HTTP/2 does."""
    startup = kits / "localhost/startup"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(startup / "rootCA.pem"))
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(startup / "server.crt", startup / "server.key")

    def answer(plain):
        with plain, context.wrap_socket(plain, server_side=True) as tls:
            tls.sendall(bytes.fromhex("000000040000000000"))

    return listen(answer)


@pytest.fixture
def server(handed_over):
    listener, port = server_of(handed_over.kits)
    yield port
    listener.close()


def aim(kit, port):
    path = kit / "startup/fed_client.json"
    path.write_text(path.read_text().replace("localhost:443", f"localhost:{port}"))


def row(kit, name):
    return next(row for row in check(kit) if row.name == name)


def test_the_server_answers_to_the_kit_s_certificate(kit, server):
    aim(kit, server)
    assert row(kit, "name").passed
    found = row(kit, "connection")
    assert found.passed, found
    assert f"localhost:{server} answers" in found.found


def test_nobody_there_is_told_with_host_and_port(kit):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    aim(kit, port)
    found = row(kit, "connection")
    assert found.passed is False
    assert f"outgoing TCP to localhost:{port}" in found.mend


def test_another_server_is_told(kit, strangers):
    listener, port = server_of(strangers)
    aim(kit, port)
    found = row(kit, "connection")
    listener.close()
    assert found.passed is False
    assert "not the server's certificate" in found.found


def test_a_certificate_that_the_server_refuses_is_told(kit, server, strangers):
    aim(kit, server)
    for name in ("client.crt", "client.key"):
        shutil.copy(strangers / "hospital-a/startup" / name, kit / "startup" / name)
    found = row(kit, "connection")
    assert found.passed is False
    assert "refused this certificate" in found.found


def proxy(seen, status="200 Connection established", to=0):
    """A forward proxy that takes CONNECT to one port of this machine."""

    def answer(plain):
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += plain.recv(1)
        seen.append(head.decode())
        plain.sendall(f"HTTP/1.1 {status}\r\n\r\n".encode())
        if not status.startswith("200"):
            plain.close()
            return
        behind = socket.create_connection(("127.0.0.1", to))
        for source, sink in ((plain, behind), (behind, plain)):
            threading.Thread(target=forward, args=(source, sink), daemon=True).start()

    return listen(answer)


def forward(source, sink):
    try:
        while data := source.recv(4096):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def test_the_connection_goes_through_the_site_s_proxy(kit, server, monkeypatch):
    aim(kit, server)
    seen: list[str] = []
    listener, port = proxy(seen, to=server)
    monkeypatch.setenv("https_proxy", f"http://it:secret@127.0.0.1:{port}")
    found = row(kit, "connection")
    assert found.passed, found
    assert seen[0].startswith(f"CONNECT localhost:{server} HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic aXQ6c2VjcmV0" in seen[0]
    assert "by the proxy 127.0.0.1" in row(kit, "name").found
    listener.close()
    listener, port = proxy(seen, status="403 Forbidden")
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
    found = row(kit, "connection")
    listener.close()
    assert found.passed is False
    assert "403 Forbidden" in found.found


def test_the_proxy_is_the_one_that_grpc_takes(kit, monkeypatch):
    assert proxy_for("fl.example.org") is None
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    assert proxy_for("fl.example.org") is None
    found = row(kit, "connection")
    assert found.passed is False
    assert "in small letters" in found.mend
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    assert proxy_for("fl.example.org").hostname == "proxy"
    monkeypatch.setenv("no_proxy", "localhost,.example.org")
    assert proxy_for("fl.example.org") is None


def test_installed_packages_are_compared_with_the_lock(kit):
    versions = {name: preflight._installed(name) for name in ("numpy", "torch")}
    lines = "".join(f"{name}=={version} \\\n    --hash=sha256:0\n" for name, version in versions.items())
    for lock in ("requirements.lock", "requirements-gpu.lock"):
        (kit / "local" / lock).write_text(lines)
    assert row(kit, "packages").passed
    for lock in ("requirements.lock", "requirements-gpu.lock"):
        (kit / "local" / lock).write_text(lines.replace(versions["numpy"], "0.1") + "no-such-package==1\n")
    found = row(kit, "packages")
    assert found.passed is False
    assert found.found == f"numpy {versions['numpy']}, not 0.1; no-such-package missing, not 1"


def test_a_package_in_the_environment_that_would_hide_the_kit_s_is_told(kit, tmp_path, monkeypatch):
    custom = str(kit / "local/custom")
    finders = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
    monkeypatch.setattr(sys, "meta_path", finders)
    elsewhere = [path for path in sys.path if not (Path(path or ".") / "fedimaging").is_dir()]
    monkeypatch.setattr(sys, "path", [custom, *elsewhere])
    assert row(kit, "package").passed
    shutil.copytree(kit / "local/custom/fedimaging", tmp_path / "site-packages/fedimaging")
    monkeypatch.setattr(sys, "path", [custom, *elsewhere, str(tmp_path / "site-packages")])
    found = row(kit, "package")
    assert (found.passed, found.mend) == (False, "pip uninstall fedimaging")


def test_datasets_are_counted_by_split_and_what_is_wrong_is_said(kit, tmp_path, monkeypatch):
    monkeypatch.delenv("FEDIMAGING_DATA", raising=False)
    assert row(kit, "datasets").passed is False
    synthesize(tmp_path / "data", hospitals=1, cases=(40,), longer=48, seed=1)
    folder = next((tmp_path / "data").rglob("manifest.json")).parent
    (kit / "local/datasets.yml").write_text(f"chest_xray: {{path: {folder}}}\n")
    found = row(kit, "datasets")
    assert found.passed
    assert sum(int(part.split()[0]) for part in found.found.removeprefix("chest_xray: ").split(", ")) == 40
    next(folder.rglob("*.dcm")).unlink()
    assert row(kit, "datasets").passed is False
    (kit / "local/datasets.yml").write_text("chest_xray: {path: /nowhere}\n")
    assert "/nowhere" in row(kit, "datasets").found
    (kit / "local/datasets.yml").write_text("chest_xray: [")
    assert row(kit, "datasets").passed is False


def test_what_is_granted_is_said(kit):
    found = row(kit, "grants")
    assert (found.passed, found.found) == (None, "nothing is granted: every job is refused")
    path = kit / "local/grants.yml"
    grant = "{id: a1, dataset: chest_xray, job: first, role: lead, kinds: [train], until: 2999-01-01}"
    path.write_text(f"grants: [{grant}]\n")
    assert row(kit, "grants").found == "first on chest_xray for any lead"
    path.write_text(f"grants: [{grant.replace('2999', '2020')}]\n")
    assert row(kit, "grants").passed is None
    path.write_text("grants: [{id: a1}]\n")
    assert row(kit, "grants").passed is False


def test_the_site_s_own_policies_must_be_json(kit):
    assert row(kit, "own files").passed
    (kit / "local/resources.json").write_text("{")
    found = row(kit, "own files")
    assert found.passed is False
    assert "resources.json: not JSON" in found.found


def test_gpus_that_are_promised_must_be_there(kit):
    assert row(kit, "gpus").passed
    own = (kit / "local/resources.json.default").read_text().replace('"num_of_gpus": 0', '"num_of_gpus": 99')
    (kit / "local/resources.json").write_text(own)
    found = row(kit, "gpus")
    assert found.passed is False
    assert "99 promised" in found.found


def test_the_machine_and_the_certificate_are_looked_at(kit):
    rows = {found.name: found for found in check(kit)}
    assert {"python", "cores", "memory", "disk", "certificate", "clock", "flare"} <= set(rows)
    assert rows["certificate"].found == "364 days left"
    assert "GiB free" in rows["disk"].found


def test_the_exit_code_says_whether_the_kit_can_be_started(kit, capsys, monkeypatch):
    monkeypatch.setattr(preflight, "_flare", lambda kit: (True, "not asked in this test"))
    assert main(kit) == 1
    said = capsys.readouterr().out
    assert "failed: " in said and "datasets" in said and "connection" in said
    monkeypatch.setattr(preflight, "check", lambda kit: [preflight.Row("a", True, "b"), preflight.Row("c", None, "d")])
    assert main(kit) == 0
    assert "can be started" in capsys.readouterr().out


def test_a_kit_that_does_not_verify_is_not_looked_into(kit, handed_over, tmp_path):
    from provisioning import kit as kit_file
    from tests.provisioning.conftest import pins

    pins(handed_over, "hospital-a").write(tmp_path / "pins.json")
    (kit / "local/custom/fedimaging/federation/preflight.py").write_text("print('I was run')\n")
    done = subprocess.run(
        [sys.executable, "-I", kit_file.__file__, "preflight", str(kit), "--pins", str(tmp_path / "pins.json")],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "I was run" not in done.stdout
    assert "preflight.py" in done.stderr
