"""What training two models at a time saves a comparison, against one after the other with all cores each.

Example: python tests/benchmarks/side_by_side.py --data data/compare --set rounds=2
"""

import argparse
import tempfile
import time
from pathlib import Path

from rich.console import Console

from fedimaging.compare.runs import Comparison
from fedimaging.compare.workers import train_side_by_side
from fedimaging.federation.job import parse_changes

JOBS = Path(__file__).parents[2] / "jobs"
console = Console(stderr=True)


def seconds(comparison: Comparison, parallel: int) -> float:
    """Wall time of the first two hospitals' own models, processes' start and test cases included."""
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        for result in train_side_by_side(
            comparison, Path(folder), comparison.runs[:2], parallel,
            started=lambda run: None, report=lambda run, event: None,
        ):  # fmt: skip
            console.print(f"{parallel} at a time: {result.run.title}, {result.seconds:.0f} s")
    return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", type=Path, default=JOBS / "chest_xray_fedavg", help="(default: %(default)s)")
    parser.add_argument("--data", type=Path, required=True, help="data root with <site>/<dataset>/manifest.json")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", dest="changes")
    arguments = parser.parse_args()
    comparison = Comparison([arguments.job], arguments.data, [0], parse_changes(arguments.changes))
    one, two = seconds(comparison, 1), seconds(comparison, 2)
    Console().print(
        f"two models one after the other against two at a time: {one / two:.2f}x ({one:.0f} s, {two:.0f} s)"
    )


if __name__ == "__main__":
    main()
