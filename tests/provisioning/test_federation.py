"""A whole federation on kits over real processes: a job from the admin console, attacks, and a long life.

One federation serves all of this module: its tests stand in the order of that life, and the last one ends it.
"""

import contextlib
import json
import re
import shutil
import socket
import ssl
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from cryptography.hazmat.primitives import serialization
from nvflare.lighter.utils import Identity, generate_cert

from fedimaging import __version__
from fedimaging.simulator import stop_process_tree
from fedimaging.version import PACKAGE, package_hash
from provisioning import package as site_package
from provisioning.keys import Keys, new_rsa_key, private_pem
from provisioning.lifecycle import renew
from provisioning.package import write_package
from tests.conftest import JOB, SITES, fedimaging
from tests.console import AdminConsole, LoginRefusedError
from tests.provisioning.conftest import FOURTH, PASSPHRASE, PATIENCE, tree, wait_for
from tests.provisioning.participants import LEAD, MEMBER, PROJECT_ADMIN, SERVER, RunningFederation, listens
from tests.rounds import assert_same_course, events

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def federation(hospitals, tmp_path_factory):
    """A server and three hospitals, each with its own data, verified, started and registered."""
    made = RunningFederation(tmp_path_factory.mktemp("kits"))
    try:
        for name in SITES:
            give_data(made[name].kit / "local", hospitals / name / "chest_xray")
        rotate_often(made["hospital-c"].kit / "local")
        made.start(SERVER)
        wait_for(lambda: listens(made.port))
        checked = made["hospital-a"].run("preflight", made["hospital-a"].kit, "--pins", made["hospital-a"].pins)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        made.start(*SITES)
        made.wait_for(*SITES)
        yield made
    finally:
        made.kill()


def give_data(local, folder):
    """What a site's IT and its data owner write: where the images are, and that leads may use them."""
    (local / "datasets.yml").write_text(yaml.safe_dump({"chest_xray": {"path": str(folder)}}))
    grant = {"id": "leads", "dataset": "chest_xray", "job": "*", "role": "lead", "kinds": ["train", "evaluate"]}
    (local / "grants.yml").write_text(yaml.safe_dump({"grants": [grant]}))


def rotate_often(local):
    """The site's own log configuration: as delivered, but files of 20 kB."""
    config = json.loads((local / "log_config.json.default").read_text())
    for handler in config["handlers"].values():
        if "maxBytes" in handler:
            handler["maxBytes"] = 20_000
    (local / "log_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def lead(federation):
    """The lead's admin console."""
    with federation[LEAD].console() as console:
        yield console


@pytest.fixture(scope="module")
def finished_job(federation, lead, tmp_path_factory):
    """The committed job, submitted by the lead from the admin console, watched, and its result downloaded."""
    copy = shutil.copytree(JOB, tmp_path_factory.mktemp("jobs") / JOB.name)
    before = {name: tree(federation[name].kit / "local/custom") for name in (SERVER, *SITES)}
    job_id = lead.submit(copy)
    meta, folder = lead.finished(job_id), lead.download(job_id)
    return SimpleNamespace(id=job_id, meta=meta, folder=folder, workspace=folder / "workspace", before=before)


def test_the_package_comes_from_the_kits_alone(federation):
    for name in (SERVER, *SITES, LEAD):
        found = subprocess.run(
            [federation[name].python, "-c", "import nvflare, fedimaging"],
            cwd=federation[name].place, env=federation[name].variables, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert "No module named 'fedimaging'" in found.stderr


def test_the_committed_job_runs_from_the_console(finished_job):
    assert finished_job.meta["status"] == "FINISHED:COMPLETED"
    assert sorted(finished_job.meta["job_deploy_detail"]) == sorted(f"{name}: OK" for name in ("server", *SITES))
    start, *rounds, _, end = events(finished_job.workspace)
    assert [record["round"] for record in rounds] == list(range(start["rounds"]))
    assert all(set(record["sites"]) == set(SITES) and not record["refused"] for record in rounds)
    assert end["event"] == "end"


def test_it_learns_what_it_learns_in_the_simulator(finished_job, plain_run):
    assert_same_course(finished_job.workspace, plain_run[0] / "server/simulate_job")


def test_the_report_of_a_download_is_written(finished_job):
    done = fedimaging("report", finished_job.folder)
    assert done.returncode == 0, done.stderr
    page = (finished_job.folder / "report.html").read_text()
    assert all(site in page for site in SITES)


def test_nothing_that_names_a_case_is_at_the_server_or_in_any_log(federation, finished_job, hospitals, case_names):
    server = federation[SERVER].kit
    sent = [path for path in (*server.glob("*"), *finished_job.workspace.rglob("*")) if path.is_file()]
    logs = [path for site in SITES for path in federation[site].kit.glob("**/*log*") if path.is_file()]
    logs = [path for path in logs if "local" not in path.parts]
    assert {"log.txt", "log.json", "error_log.txt", "audit.log"} <= {path.name for path in sent}
    assert {"log.txt", "log.json", "error_log.txt", "audit.log"} <= {path.name for path in logs}
    for path in (*sent, *logs):
        found = case_names.search(path.read_bytes())
        assert found is None, f"{path} holds {found.group()!r}"
    for path in sent:
        assert str(hospitals).encode() not in path.read_bytes()


def test_no_site_s_log_is_sent_to_the_server(federation, finished_job):
    known = (federation[SERVER].kit / "log.txt").read_text()
    assert all(f"client {site} registered with site_config keys: ['allow_log_streaming']" in known for site in SITES)
    line = "client runner started"
    assert line in (federation["hospital-a"].kit / finished_job.id / "log.txt").read_text()
    for path in (*federation[SERVER].kit.glob("*"), *finished_job.workspace.rglob("*")):
        assert not path.is_file() or line.encode() not in path.read_bytes()


def test_the_logs_rotate_as_the_site_says(federation, finished_job):
    folder = federation["hospital-c"].kit / finished_job.id
    assert (folder / "log.txt.1").is_file()
    assert (folder / "log.json.1").is_file()
    assert all(path.stat().st_size <= 20_000 for path in folder.glob("log.*"))


def test_after_a_job_the_kits_are_as_they_were(federation, finished_job):
    for name in (SERVER, *SITES, LEAD):
        verified = federation[name].run("verify", federation[name].kit, "--pins", federation[name].pins)
        assert verified.returncode == 0, verified.stderr
    for name, before in finished_job.before.items():
        assert tree(federation[name].kit / "local/custom") == before
    site_report = federation["hospital-a"].kit / finished_job.id / "site_report.json"
    assert site_report.stat().st_mode & 0o777 == 0o600


# -- attacks: who refuses what -----------------------------------------------------------------------------------------

HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
"""the first words of every gRPC client; a server answers with its settings"""
SETTINGS = b"\4"
"""the type of the frame that it answers with"""


@pytest.fixture(scope="module")
def strangers_keys():
    """Another federation of the same name."""
    return Keys.make("fedimaging", valid_days=30)


@pytest.fixture
def issue(federation, strangers_keys, tmp_path):
    """Makes a key and a certificate: of this federation, of another one, or expired."""
    ours = Keys.read(federation.made.folder, PASSPHRASE)

    def made(kind, name, org, role=None):
        keys, first, last = {"good": (ours, -1, 1), "foreign": (strangers_keys, -1, 1), "expired": (ours, -3, -1)}[kind]
        key, now = new_rsa_key(), datetime.now(UTC)
        certificate = generate_cert(
            Identity(name, org, role), Identity("fedimaging"), keys.root_key, key.public_key(),
            not_valid_before=now + timedelta(days=first), not_valid_after=now + timedelta(days=last),
        )  # fmt: skip
        pair = tmp_path / f"{kind}.crt", tmp_path / f"{kind}.key"
        pair[0].write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        pair[1].write_bytes(private_pem(key))
        return pair

    return made


def answer(federation, certificate=None):
    """What the server's port says to a gRPC client under TLS; nothing if it hangs up."""
    context = ssl.create_default_context(cafile=federation["hospital-a"].kit / "startup/rootCA.pem")
    context.set_alpn_protocols(["h2"])
    if certificate:
        context.load_cert_chain(*certificate)
    with socket.create_connection(("localhost", federation.port), timeout=PATIENCE) as plain:
        try:
            with context.wrap_socket(plain, server_hostname="localhost") as secured:
                secured.sendall(HTTP2)
                return secured.recv(100)
        except (ssl.SSLError, ConnectionError):
            return b""


@pytest.mark.parametrize("kind", [None, "foreign", "expired"])
def test_the_server_hangs_up_on_whoever_shows_no_valid_certificate_of_the_federation(federation, issue, kind):
    assert answer(federation, issue("good", "hospital-a", "hospital_a"))[3:4] == SETTINGS
    assert answer(federation, kind and issue(kind, "hospital-a", "hospital_a")) == b""


def test_the_server_hangs_up_on_a_plain_connection(federation):
    with socket.create_connection(("localhost", federation.port), timeout=PATIENCE) as plain:
        plain.sendall(HTTP2)
        with contextlib.suppress(ConnectionResetError):
            assert plain.recv(100) == b""


def without_kit_py(participant, folder, certificate=None):
    """An attacker's copy of a kit, which no kit.py verifies, and the environment to run it in."""
    ignored = shutil.ignore_patterns("*.fl", "log.*", "*.log", "*-*-*-*-*", "transfer")
    copy = shutil.copytree(participant.kit, folder / participant.name, ignore=ignored)
    for file, suffix in zip(certificate or (), ("crt", "key"), strict=False):
        shutil.copy(file, copy / f"startup/client.{suffix}")
    path = f"{participant.python.parent}:{participant.variables['PATH']}"
    code = {"PYTHONPATH": str(copy / "local/custom"), "PYTHONDONTWRITEBYTECODE": "1"}
    return copy, participant.variables | code | {"PATH": path}


@pytest.mark.parametrize("kind", ["foreign", "expired"])
def test_the_console_does_not_even_try_with_such_a_certificate(federation, issue, tmp_path, kind):
    kit, environment = without_kit_py(federation[LEAD], tmp_path, issue(kind, LEAD, "consortium", "lead"))
    with pytest.raises(LoginRefusedError, match="InvalidCertChain"):
        AdminConsole(kit, LEAD, environment=environment)


def test_the_server_refuses_a_user_who_gives_another_s_name(federation):
    log = federation[SERVER].kit / "log.txt"
    before = log.read_text()
    with pytest.raises(LoginRefusedError, match="registration rejected"):
        federation[LEAD].console(user=PROJECT_ADMIN)
    assert "failed to verify client identity: CNMismatch" in log.read_text().removeprefix(before)


def test_the_server_refuses_a_site_that_gives_another_s_name(federation, tmp_path):
    kit, environment = without_kit_py(federation["hospital-b"], tmp_path)
    command = (
        f"{federation['hospital-b'].python} -m nvflare.private.fed.app.client.client_train -m {kit} -s fed_client.json "
        "--set secure_train=true uid=hospital-a org=hospital_a config_folder=config"
    )
    said = "authenticated as 'hospital-b' but claimed endpoint 'hospital-a'"
    impostor = subprocess.Popen(
        command.split(), cwd=kit, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: said in (federation[SERVER].kit / "log.txt").read_text())
        assert impostor.poll() is None, "it is still trying"
    finally:
        stop_process_tree(impostor.pid)
    assert "Successfully registered" not in (kit / "log.txt").read_text()
    assert federation.registered() == set(SITES)


def test_the_server_refuses_a_member_s_job(federation, tmp_path):
    with federation[MEMBER].console() as console:
        said = console.send(f"submit_job {shutil.copytree(JOB, tmp_path / 'job')}")
        assert "not authorized" in said.lower()
        assert "Submitted" not in said
        assert "Registered clients: 3" in console.send("check_status server")


# -- jobs that attack --


def job_with(folder, *, server=None, sites=None, meta=None):
    """A copy of the committed job, one round long, that deploys another app to the server and to each site.

    One site is enough for it, so that one that refuses does not end it for the others.

    Args:
        folder: where to write it.
        server: changes the server's configuration.
        sites: by site, what changes its configuration, or None.
        meta: entries of meta.json.
    """
    apps = {"server": server, **(sites or {"hospital-a": None})}
    for name, change in apps.items():
        app = shutil.copytree(JOB / "app", folder / f"app_{name}") / "config"
        for side in ("server", "client"):
            path = app / f"config_fed_{side}.json"
            config = json.loads(path.read_text())
            if side == "server":
                config["workflows"][0]["args"] |= {"num_rounds": 1, "min_clients": 1}
            if change and (name == "server") == (side == "server"):
                change(config)
            path.write_text(json.dumps(config))
    content = json.loads((JOB / "meta.json").read_text()) | {
        "min_clients": 1,
        "deploy_map": {f"app_{name}": [name] for name in apps},
    }
    (folder / "meta.json").write_text(json.dumps(content | (meta or {})))
    return folder


def refused_at_deployment(lead, job):
    """Submits a job that is to fail before anything of it runs. Returns who said what of it."""
    meta = lead.finished(lead.submit(job))
    assert meta["status"] == "FINISHED:FAILED_TO_RUN"
    assert not meta["start_time"]
    return meta["job_deploy_detail"][:2]


def test_the_server_refuses_code_that_comes_with_a_job(lead, tmp_path):
    job = shutil.copytree(JOB, tmp_path / "job")
    (job / "app/custom").mkdir()
    (job / "app/custom/helper.py").write_text("")
    assert refused_at_deployment(lead, job) == ["server: BYOC not permitted"]


def test_a_site_refuses_code_that_comes_for_it_alone(lead, tmp_path):
    job = job_with(tmp_path / "job", sites={"hospital-b": None})
    (job / "app_hospital-b/custom").mkdir()
    (job / "app_hospital-b/custom/helper.py").write_text("")
    said = refused_at_deployment(lead, job)
    assert said == ["server: OK", "hospital-b: NVFLARE_ERROR: BYOC not permitted"]


def test_a_site_refuses_a_container_that_a_job_names(lead, tmp_path):
    job = job_with(tmp_path / "job", meta={"launcher_spec": {"hospital-a": {"docker": {"image": "evil"}}}})
    said = refused_at_deployment(lead, job)
    assert said == ["server: OK", "hospital-a: NVFLARE_ERROR: BYOC not permitted"]


MARK = Path("/tmp/fedimaging-kits-were-here")
POPEN = {"path": "subprocess.Popen", "args": {"args": ["touch", str(MARK)]}}
MODEL = {"path": "nvflare.app_opt.pt.file_model_persistor.PTFileModelPersistor", "args": {}}
STREAM = {"id": "logs", "path": "nvflare.app_common.logging.job_log_streamer.JobLogStreamer", "args": {}}
FILTER = {"tasks": ["*"], "filters": [{"path": "nvflare.app_common.filters.exclude_vars.ExcludeVars", "args": {}}]}


def server_setting(name, value):
    def change(config):
        config["components"][0]["args"]["network"][name] = value

    return change


def site_setting(group, name, value):
    def change(config):
        arguments = config["executors"][0]["executor"]["args"]
        (arguments[group] if group else arguments)[name] = value

    return change


SERVER_ATTACKS = {
    "class at top level": (lambda c: c["components"].append({"id": "x", **MODEL}), "PTFileModelPersistor' at config"),
    "nested class": (lambda c: c["components"][0]["args"].update(network=POPEN), "'subprocess.Popen' at config"),
    "config_type dict": (
        lambda c: c["components"][0]["args"].update(network={"config_type": "dict", **POPEN}),
        "network.name: not a registered network",
    ),
    "checkpoint": (server_setting("checkpoint", "/etc/passwd"), "network.checkpoint: unknown setting"),
    "environment variable": (server_setting("name", "{$HOME}"), "asks for environment variables of the server"),
}
"""what changes the server's configuration, and what the server says in its log"""
SITE_ATTACKS = {
    "class at top level": (lambda c: c["components"].append(STREAM), "JobLogStreamer' at config", None),
    "nested class": (site_setting("", "task", POPEN), "'subprocess.Popen' at config", None),
    "class of a filter": (lambda c: c["task_result_filters"].append(FILTER), "ExcludeVars' at config", None),
    "config_type dict": (
        site_setting("", "task", {"config_type": "dict", **POPEN}), "task.name: not a registered task", "bad_setting"
    ),
    "path": (site_setting("", "dataset", "../../../etc"), "no grant for the dataset", "no_consent"),
    "URL": (site_setting("network", "name", "https://example.org/x.pt"), "not a registered network", "bad_setting"),
    "command": (site_setting("task", "name", f"$(touch {MARK})"), "not a registered task", "bad_setting"),
    "checkpoint": (site_setting("training", "checkpoint", "/etc/passwd"), "checkpoint: unknown setting", "bad_setting"),
    "environment variable": (site_setting("network", "name", "{$HOME}"), "asks for environment", "bad_setting"),
}  # fmt: skip
"""what changes a site's configuration, what the site says in its log, and the code that the server is told

A class off the list ends the site's part, and FLARE then the job, before the first task; no code is told.
"""


@pytest.fixture(scope="module")
def attacked(federation, lead, tmp_path_factory):
    """All of these attacks, those that leave a job alive by threes. Returns what came of each."""
    folder, outcomes, submitted = tmp_path_factory.mktemp("attacks"), {}, []
    alone = [name for name, (_, _, code) in SITE_ATTACKS.items() if code is None]
    others = [name for name in SITE_ATTACKS if name not in alone]
    jobs = [(None, {SITES[0]: name}) for name in alone]
    jobs += [(None, dict(zip(SITES, others[i : i + 3], strict=True))) for i in range(0, len(others), 3)]
    jobs += [(name, {}) for name in SERVER_ATTACKS]
    for at_server, at_sites in jobs:
        changes = {site: SITE_ATTACKS[name][0] for site, name in at_sites.items()}
        server = SERVER_ATTACKS[at_server][0] if at_server else None
        job = job_with(folder / str(len(submitted)), server=server, sites=changes)
        submitted.append((lead.submit(job), {"server": at_server, **at_sites}))
    for job_id, attacks in submitted:
        meta, workspace = lead.finished(job_id), lead.download(job_id) / "workspace"
        for place, name in attacks.items():
            run = workspace if place == "server" else federation[place].kit / job_id
            log = (run / "log.txt").read_text()
            outcomes[place == "server", name] = SimpleNamespace(log=log, meta=meta, workspace=workspace, place=place)
    return outcomes


@pytest.mark.parametrize("attack", SERVER_ATTACKS)
def test_the_server_refuses(attacked, attack):
    outcome = attacked[True, attack]
    assert SERVER_ATTACKS[attack][1] in outcome.log
    assert outcome.meta["status"] != "FINISHED:COMPLETED"
    assert not list(outcome.workspace.rglob("*.pt"))
    assert not MARK.exists()


@pytest.mark.parametrize("attack", SITE_ATTACKS)
def test_a_site_refuses(attacked, attack):
    outcome, (_, said, code) = attacked[False, attack], SITE_ATTACKS[attack]
    assert said in outcome.log
    assert outcome.meta["status"] != "FINISHED:COMPLETED"
    assert not MARK.exists()
    if code is not None:
        told = [record for record in events(outcome.workspace) if record.get("site") == outcome.place]
        assert {record["reason"] for record in told} == {code}


def test_the_site_s_own_word_holds(federation, lead, tmp_path):
    """The site's steward lets nobody submit jobs to it; the server and the other sites still do."""
    site = federation["hospital-b"]
    own = site.kit / "local/authorization.json"
    policy = json.loads((site.kit / "local/authorization.json.default").read_text())
    policy["permissions"]["lead"]["submit_job"] = "none"
    own.write_text(json.dumps(policy))
    try:
        assert site.run("restart", site.kit, "--pins", site.pins).returncode == 0
        federation.wait_for(*SITES)
        said = refused_at_deployment(lead, job_with(tmp_path / "job", sites={"hospital-b": None}))
        assert said == ["server: OK", f"hospital-b: user '{LEAD}' is not authorized for 'submit_job'"]
    finally:
        own.unlink()
        assert site.run("restart", site.kit, "--pins", site.pins).returncode == 0
        federation.wait_for(*SITES)


# -- the federation's life ---------------------------------------------------------------------------------------------

ALL = (*SITES, "hospital-d")


def untouched(federation, *names):
    """What must not change where nothing is touched: FLARE's long-lived process, and the files of the kit."""
    pids = {name: int((federation[name].kit / "pid.fl").read_text()) for name in names}
    assert pids.items() <= {(name, process.pid) for name in names for process in federation[name].processes()}
    return pids, {name: [tree(federation[name].kit / folder) for folder in ("startup", "local")] for name in names}


def test_a_fourth_hospital_joins_and_nobody_else_is_touched(federation, hospitals):
    before = untouched(federation, SERVER, *SITES)
    assert federation.add(FOURTH) == ["hospital-d", "admin@hospital-d.example.org"]
    give_data(federation["hospital-d"].kit / "local", hospitals / "hospital-a" / "chest_xray")
    federation.start("hospital-d")
    federation.wait_for(*ALL)
    assert untouched(federation, SERVER, *SITES) == before


def test_a_certificate_is_renewed_and_the_federation_goes_on(federation):
    site, others = federation["hospital-b"], (SERVER, "hospital-a", "hospital-c", "hospital-d")
    before = untouched(federation, *others)
    certificate = renew(federation.made.federation, site.name, PASSPHRASE, 30)
    installed = site.run("install-certificate", site.kit, certificate, "--pins", site.pins)
    assert installed.returncode == 0, installed.stderr
    restarted = site.run("restart", site.kit, "--pins", site.pins)
    assert "certificate valid for 29 days" in restarted.stdout
    federation.wait_for(*ALL)
    assert untouched(federation, *others) == before


@pytest.fixture(scope="module")
def newer_package(federation, tmp_path_factory):
    """The site package of the next version, which jobs of this one can run on."""
    folder = tmp_path_factory.mktemp("newer")
    package = shutil.copytree(PACKAGE, folder / "fedimaging", ignore=shutil.ignore_patterns("__pycache__"))
    init = (package / "__init__.py").read_text()
    assert f'"{__version__}"' in init
    (package / "__init__.py").write_text(init.replace(f'"{__version__}"', f'"{__version__}.post1"'))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site_package, "PACKAGE", package)
        patch.setattr(site_package.fedimaging, "__version__", f"{__version__}.post1")
        write_package(folder / "newer.package", Keys.read(federation.made.folder, PASSPHRASE).code_key)
    return folder / "newer.package"


def change_version(participant, *command):
    """Stops a participant, has kit.py install or roll back a package, and starts it."""
    for arguments in (("stop", participant.kit), command, ("start", participant.kit, "--pins", participant.pins)):
        done = participant.run(*arguments)
        assert done.returncode == 0, done.stderr


def known_jobs(federation):
    with federation[LEAD].console() as console:
        return set(re.findall(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", console.send("list_jobs")))


def versions_of_a_small_job(federation, folder):
    """Runs a job of one round and one batch on all sites. Returns the versions that the server and the sites ran."""

    def small(config):
        config["executors"][0]["executor"]["args"]["training"]["max_batches"] = 1

    job = job_with(folder / "job", sites=dict.fromkeys(ALL, small))
    with federation[LEAD].console() as console:
        job_id = console.submit(job)
        assert console.finished(job_id)["status"] == "FINISHED:COMPLETED"
        start, first, *_ = events(console.download(job_id) / "workspace")
    versions = {site: figures["fedimaging"]["version"] for site, figures in first["sites"].items()}
    return {SERVER: start["versions"]["fedimaging"], **versions}


def test_a_version_is_installed_at_the_server_and_a_site_and_rolled_back(federation, newer_package, tmp_path):
    changed, others = (federation[SERVER], federation["hospital-a"]), ALL[1:]
    before, jobs = untouched(federation, *others), known_jobs(federation)
    for participant in changed:
        change_version(participant, "install", participant.kit, newer_package, "--pins", participant.pins)
    federation.wait_for(*ALL)
    old, new = dict.fromkeys(others, __version__), dict.fromkeys((SERVER, "hospital-a"), f"{__version__}.post1")
    assert versions_of_a_small_job(federation, tmp_path / "new") == old | new
    for participant in changed:
        change_version(participant, "rollback", participant.kit, "--pins", participant.pins)
    federation.wait_for(*ALL)
    for participant in changed:
        status = participant.run("status", participant.kit, "--pins", participant.pins)
        assert f"fedimaging {__version__}, {package_hash()}" in status.stdout
    assert untouched(federation, *others) == before
    assert jobs < known_jobs(federation)


def test_the_project_admin_shuts_everything_down_from_the_console(federation, lead):
    lead.close()
    assert len(federation.processes()) >= 2 * len([SERVER, *SITES])
    federation.shut_down()
    assert federation.processes() == []
    for name in (SERVER, *SITES):
        assert not (federation[name].kit / "pid.fl").exists()
        assert federation[name].run("verify", federation[name].kit, "--pins", federation[name].pins).returncode == 0
