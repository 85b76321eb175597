"""Fixtures of all tests."""

from pathlib import Path

import hypothesis
import pytest

# A busy machine is no failure.
hypothesis.settings.register_profile("fedimaging", deadline=None)
hypothesis.settings.load_profile("fedimaging")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real public images beside the repository; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data beside the repository: it holds the real images")
    return folder
