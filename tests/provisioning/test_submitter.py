"""Who submitted a job, as a hospital's kit can prove it: by the signature of the lead's own kit on the job."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.lighter.utils import load_private_key_file, sign_folders

from fedimaging.federation.custody import JobFacts
from fedimaging.federation.protocol import CLIENT_CONFIG
from fedimaging.governance.grants import config_hash

APP = Path(__file__).parents[2] / "jobs" / "chest_xray_fedavg" / "app"
SAID = {"name": "chest_xray_fedavg", "submitter_name": "admin@example.org", "submitter_role": "project_admin"}


@pytest.fixture
def deployed(tmp_path):
    """A job's app as a hospital gets it."""
    return Path(shutil.copytree(APP, tmp_path / "app"))


def sign(app, kit):
    startup = kit / "startup"
    sign_folders(str(app), load_private_key_file(str(startup / "client.key")), str(startup / "client.crt"))


def facts(app, kit):
    fl_ctx = FLContext()
    workspace = SimpleNamespace(
        get_app_dir=lambda _: str(app),
        get_app_config_dir=lambda _: str(app / "config"),
        get_file_path_in_startup=lambda name: str(kit / "startup" / name),
    )
    fl_ctx.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace)
    fl_ctx.set_prop(FLContextKey.JOB_META, SAID)
    return JobFacts.read(fl_ctx, "chest_xray")


def test_a_signed_job_is_its_signer_s_whatever_the_server_says(deployed, handed_over):
    sign(deployed, handed_over.kits / "lead@example.org")
    known = facts(deployed, handed_over.kits / "hospital-a")
    assert (known.submitter, known.role, known.signed) == ("lead@example.org", "lead", True)
    assert known.config == config_hash((APP / "config" / CLIENT_CONFIG).read_bytes())


def test_without_a_signature_it_is_the_server_s_word(deployed, handed_over):
    known = facts(deployed, handed_over.kits / "hospital-a")
    assert (known.submitter, known.role, known.signed) == ("admin@example.org", "project_admin", False)


@pytest.mark.parametrize("how", ["changed", "added", "by a hospital"])
def test_a_signature_that_does_not_fit_proves_nothing(deployed, handed_over, how):
    sign(deployed, handed_over.kits / ("hospital-b" if how == "by a hospital" else "lead@example.org"))
    if how == "changed":
        config = deployed / "config" / CLIENT_CONFIG
        config.write_text(config.read_text().replace("chest_xray", "chest_xrax"))
    if how == "added":
        (deployed / "config" / "more.json").write_text("{}")
    assert not facts(deployed, handed_over.kits / "hospital-a").signed
