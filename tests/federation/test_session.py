"""What a site writes where when it does not answer a task."""

import json

import pytest

from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.protocol import PROGRESS_FILE
from fedimaging.federation.session import Session


def refused(error, folder):
    """The event that the site keeps in the job's folder."""
    session = Session({}, site="hospital-a", local=folder, run_dir=folder)
    session.refuse(error)
    return json.loads((folder / PROGRESS_FILE).read_text())


@pytest.mark.parametrize("reason", [Reason.BAD_MANIFEST, Reason.UNREADABLE_IMAGES])
def test_the_log_does_not_name_a_case_and_the_job_s_folder_does(tmp_path, caplog, reason):
    event = refused(FedImagingError("images/John Doe: can't be read", reason), tmp_path)
    assert event["message"] == "images/John Doe: can't be read"
    assert "Doe" not in caplog.text
    assert f"refused ({reason.value}): see the end of {PROGRESS_FILE} in the job's folder" in caplog.text


def test_the_log_says_what_else_is_wrong(tmp_path, caplog):
    refused(FedImagingError("no grant for the dataset chest_xray", Reason.NO_CONSENT), tmp_path)
    assert "refused (no_consent): no grant for the dataset chest_xray" in caplog.text
