"""The version that runs, and the one that a job needs."""

import re

import pytest

from fedimaging import __version__
from fedimaging.errors import FedImagingError, Reason
from fedimaging.federation.record import _package
from fedimaging.training.settings import JobSettings
from fedimaging.version import needed_by_jobs, package_hash, require


@pytest.mark.parametrize("specifier", [">=0", needed_by_jobs(), f"=={__version__}", ">=0.1,<0.2"])
def test_a_job_that_this_version_fits_is_taken(specifier):
    require(specifier)


@pytest.mark.parametrize("specifier", ["==99.0.0", ">=99", "<0.1", f"!={__version__}"])
def test_a_job_that_needs_another_version_is_refused(specifier):
    with pytest.raises(FedImagingError, match=re.escape(f"needs fedimaging {specifier}, and this is")) as refused:
        require(specifier)
    assert refused.value.reason == Reason.WRONG_VERSION


@pytest.mark.parametrize(
    "specifier", [None, "", "new", 1, "==1,", "~=1", "1.0", ["==1"], {"a": 1}, True, "==1" * 40, "../etc"]
)
def test_something_that_is_no_version_is_a_bad_setting(specifier):
    with pytest.raises(FedImagingError, match="expected the version") as refused:
        require(specifier)
    assert refused.value.reason == Reason.BAD_SETTING


def test_the_version_is_looked_at_before_settings_that_only_another_version_knows():
    with pytest.raises(FedImagingError) as refused:
        JobSettings({"fedimaging": ">=99", "something": "new"})
    assert refused.value.reason == Reason.WRONG_VERSION


@pytest.mark.parametrize(
    "said",
    [
        None,
        "0.1.0",
        {},
        {"version": "0.1.0"},
        {"version": "0.1.0", "sha256": "x"},
        {"version": "a b", "sha256": "0" * 64},
    ],
)
def test_what_a_site_says_of_itself_is_recorded_only_in_its_form(said):
    assert _package(said) is None
    good = {"version": __version__, "sha256": package_hash()}
    assert _package({**good, "more": "x"}) == good
