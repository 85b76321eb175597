"""The site's policies, asked through FLARE's own code."""

import json
import os
import subprocess
import sys

import pytest
from nvflare.apis.fl_constant import AdminCommandNames, FilterKey
from nvflare.apis.workspace import Workspace
from nvflare.fuel.sec.authz import AuthzContext, Person
from nvflare.private.fed.app.fl_conf import create_privacy_manager
from nvflare.security.security import COMMAND_CATEGORIES, FLAuthorizer

from fedimaging.federation import policy
from fedimaging.federation.gate import Gate
from fedimaging.federation.logs import redact
from fedimaging.governance.grants import GRANTS_FILE, read_grants

ROLES = ("project_admin", "org_admin", "lead", "member")


def allowed(role, right, org="hospital_a", site="hospital_a", submitter="lead@example.org"):
    authorizer = FLAuthorizer(site, policy.authorization())
    person = Person("lead@example.org" if role == "lead" else f"{role}@x", org, role)
    context = AuthzContext(right=right, user=person, submitter=Person(submitter, "consortium", "lead"))
    return authorizer.authorize(context)[0]


@pytest.mark.parametrize("right", ["byoc", "server-predeployed-flwr", AdminCommandNames.CALL])
def test_nobody_brings_code(right):
    assert not any(allowed(role, right, org) for role in (*ROLES, "", "owner") for org in ("hospital_a", "consortium"))


def test_only_leads_submit():
    assert [role for role in ROLES if allowed(role, AdminCommandNames.SUBMIT_JOB)] == ["lead"]


@pytest.mark.parametrize("right", [name for name, kind in COMMAND_CATEGORIES.items() if kind == "shell_commands"])
def test_shell_commands_are_for_admins_of_the_site_s_own_organisation(right):
    assert not any(allowed(role, right, org="hospital_b") for role in ROLES)
    assert [role for role in ROLES if allowed(role, right)] == ["project_admin", "org_admin"]


def test_an_org_admin_operates_the_own_site_only():
    assert allowed("org_admin", AdminCommandNames.SHUTDOWN)
    assert not allowed("org_admin", AdminCommandNames.SHUTDOWN, org="hospital_b")
    assert not allowed("lead", AdminCommandNames.SHUTDOWN)


def test_a_lead_manages_own_jobs_only():
    assert allowed("lead", AdminCommandNames.ABORT_JOB)
    assert not allowed("lead", AdminCommandNames.ABORT_JOB, submitter="other@example.org")
    assert not allowed("lead", AdminCommandNames.DOWNLOAD_JOB, submitter="other@example.org")


def test_a_member_looks_and_does_nothing_else():
    rights = {*COMMAND_CATEGORIES, "submit_job", "clone_job"}
    assert {COMMAND_CATEGORIES[right] for right in rights if allowed("member", right)} == {"view"}
    assert not allowed("member", AdminCommandNames.SHOW_ERRORS)


def test_a_role_that_is_not_named_may_do_nothing():
    assert not any(allowed("visitor", right) for right in COMMAND_CATEGORIES)


# -- privacy scope -----------------------------------------------------------------------------------------------------


def test_the_gate_is_the_last_filter_of_the_kit_s_default_scope_as_flare_loads_it(handed_over):
    manager = create_privacy_manager(Workspace(str(handed_over.kits / "hospital-a"), "hospital-a"), names_only=False)
    assert manager.is_policy_defined()
    scope = manager.get_scope(None)
    assert scope.name == "default"
    assert type(scope.task_result_filters[FilterKey.OUT][-1]) is Gate
    assert manager.get_scope("another") is None


def test_as_delivered_a_kit_grants_nothing(handed_over):
    assert read_grants(handed_over.kits / "hospital-a/local" / GRANTS_FILE) == []


# -- logs --------------------------------------------------------------------------------------------------------------

SECRETS = [
    "/srv/xray/Doe^John/IM0001: can't be read",
    "/srv/x ray/P00123/IM 01.dcm: can't be read",
    "images/P00123_ap.png: is no image",
    "'case P00123/scan.nii.gz' is broken",
    "series 1.2.840.113619.2.55.3.2831.1 has gaps",
    "patient P00123 is in two splits",
    "PatientName='Doe^John', patient_id: 00123",
    "case MRN-P00123-2 unreadable",
    "MRN-00412377 unreadable",
    "case 00412377 and accession: A00412377",
    "C0041237/IM0001: can't be read",
    "Doe/John/scan",
    "DOE^JOHN and Doe^John^^Dr. have the same age",
    "KeyError: 'Doe, John'",
    "ValueError: could not convert \"Doe\" to float: 'John\\'s'",
    "Traceback (most recent call last):\nKeyError: 'Doe'",
    "KeyError: 'Doe-John'",
]


@pytest.mark.parametrize("text", SECRETS)
def test_identifiers_are_blanked(text):
    names = ("P00123", "00123", "0041237", "Doe", "DOE", "John", "JOHN", "1.2.840", "IM0001", "ap.png")
    assert not any(name in redact(text) for name in names)


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-01 12:00:00,123 - Cell - INFO - connected to grpc://fl.example.org:443",
        'File "/srv/venv/lib/python3.11/site-packages/torch/nn.py", line 3',
        "/srv/kit/local/datasets.yml: is not YAML in line 3",
        "round 3 of 8, 120 patients, loss 0.123, fedimaging 0.1.0",
        "job 0b5e3c1a-7f1d-4c8e-9a53-2f6f0d9d7c11 ended 2/3",
        "job 12345678-1234-4123-8123-123456789012 was deployed to hospital-a, port 50051, process 123456",
        "fedimaging 0.1.0 (a94a8fe5ccb19ba61c4c0873d391e987982fbbd3), 12.5 cases/s",
        "case 3 of 120: stopped at the gate: shape (64, 3, 7, 7) for 'features.conv0.weight'",
        "    ~~~~~~~^^^^^^^^^",
        "UnsafeComponentError: 'subprocess.Popen' at config.executors[0] is not on the list",
        "CommError: authenticated as 'hospital-b' but claimed endpoint 'hospital-a'",
        "ConnectionError: no answer from fl.example.org:443 within 10.0 s",
        "nvflare.private.fed.app.client.client_train - INFO - identity=hospital-a, run=1, peer=server, task_id=ab12",
    ],
)
def test_what_an_operator_needs_stays(text):
    assert redact(text) == text


def test_the_kit_s_log_configuration_rotates_and_blanks_tracebacks_too(handed_over, tmp_path):
    config = json.loads((handed_over.kits / "hospital-a/local/log_config.json.default").read_text())
    files = [handler for handler in config["handlers"].values() if "filename" in handler]
    assert len(files) == 3
    assert all(handler["class"].endswith("RotatingFileHandler") for handler in files)
    assert all(handler["maxBytes"] and handler["backupCount"] for handler in files)
    code = (
        "import logging, sys\n"
        "from nvflare.apis.workspace import Workspace\n"
        "from nvflare.fuel.utils.log_utils import configure_logging\n"
        "configure_logging(Workspace(sys.argv[1], 'hospital-a'))\n"
        "log = logging.getLogger('fedimaging.test')\n"
        "try:\n"
        "    raise ValueError('/srv/xray/P00123/IM0001.dcm: broken')\n"
        "except ValueError as error:\n"
        "    log.exception('refused: %s (patient P00123, \"IM 1.dcm\")', error)\n"
    )
    kit = tmp_path / "kit"
    (kit / "startup").mkdir(parents=True)
    (kit / "local").mkdir()
    (kit / "local/log_config.json.default").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", code, str(kit)],
        env={**os.environ, "PYTHONPATH": str(handed_over.kits / "hospital-a/local/custom")}, cwd=tmp_path,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs = {name: (kit / name).read_text() for name in ("log.txt", "log.json", "error_log.txt")}
    for text in (*logs.values(), done.stdout):
        assert "refused" in text
        assert "P00123" not in text
    assert all("Traceback" in text for text in (logs["log.txt"], logs["error_log.txt"], done.stdout))
    assert json.loads(logs["log.json"])["message"].startswith("refused: <image>")
