"""A POC of real processes for tests."""

import contextlib

import pytest

from poc.cli import main
from poc.federation import Poc, free_port


@contextlib.contextmanager
def running_poc(folder, data, port, **environment):
    """The POC of a data root, running with environment variables added; none of its processes outlives the context.

    Args:
        port: the first one that it may take.
    """
    poc = Poc(folder)
    with pytest.MonkeyPatch.context() as patch:
        # Sums over another number of threads are other sums.
        for name, value in {"OMP_NUM_THREADS": "1", **environment}.items():
            patch.setenv(name, value)
        patch.delenv("FEDIMAGING_DATA", raising=False)
        try:
            assert main(["up", "--folder", str(folder), "--data", str(data), "--port", str(free_port(port))]) == 0
            yield poc
        finally:
            if poc.prepared:
                poc.stop()
            assert poc.processes() == []
