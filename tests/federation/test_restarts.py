"""What a site keeps of a job that is deployed there anew."""

import io
import zipfile

from nvflare.apis.fl_constant import SystemComponents
from nvflare.apis.fl_context import FLContext
from nvflare.apis.workspace import Workspace
from nvflare.fuel.utils.class_utils import instantiate_class

from fedimaging.federation.policy import client_resources


def test_a_job_deployed_anew_finds_what_its_strategy_kept_and_nothing_else(tmp_path):
    for name in ("startup", "local"):
        (tmp_path / name).mkdir()
    workspace = Workspace(str(tmp_path), "hospital-a")
    (component,) = (c for c in client_resources()["components"] if c["id"] == SystemComponents.APP_DEPLOYER)
    deployer = instantiate_class(component["path"], component["args"])
    app = io.BytesIO()
    with zipfile.ZipFile(app, "w") as file:
        file.writestr("config/config_fed_client.json", "{}")

    def deploy(job):
        return deployer.deploy(workspace, job, {"name": "x"}, "app", app.getvalue(), FLContext())

    assert deploy("one") == ""
    run = tmp_path / "one"
    (run / "strategy.pt").write_text("kept")
    (run / "strategy.pt").chmod(0o600)
    (run / "left.txt").write_text("from before")
    assert deploy("two") == deploy("one") == ""
    assert (run / "strategy.pt").read_text() == "kept"
    assert (run / "strategy.pt").stat().st_mode & 0o777 == 0o600
    assert not (run / "left.txt").exists(), "the rest is FLARE's to empty"
    assert (run / "app_hospital-a/config/config_fed_client.json").exists()
    assert not (tmp_path / "two/strategy.pt").exists()
    assert not list(tmp_path.glob(".*"))
