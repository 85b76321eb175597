"""The operator's start model is for the one whom the operator names."""

import pytest
import yaml

from fedimaging.errors import FedImagingError
from fedimaging.federation.persistor import start_model

ENTRY = {"file": "spring.pt", "submitter": "lead@example.org"}


@pytest.fixture
def named(tmp_path):
    def write(content):
        (tmp_path / "start_models.yml").write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return tmp_path

    return write


def test_only_the_named_submitter_starts_from_the_model(named):
    local = named({"xray": ENTRY})
    assert start_model(local, "xray", "lead@example.org") == local / "spring.pt"
    assert start_model(local, "xray", "other@example.org") is None
    assert start_model(local, "xray", None) is None
    assert start_model(local, "another", "lead@example.org") is None


@pytest.mark.parametrize(
    "content", ["a: [", "xray: spring.pt", {"xray": {"file": "spring.pt"}}, {"xray": {**ENTRY, "file": 1}}]
)
def test_a_wrong_line_is_told_with_its_form(named, content):
    with pytest.raises(FedImagingError, match=r"start_models\.yml"):
        start_model(named(content), "xray", "lead@example.org")
