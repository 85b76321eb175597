"""What consent, gate and ledger cost of a round of training: the same round with and without them, in one process.

Example: python tests/benchmarks/governance.py --images 160 --rounds 3
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from rich.console import Console
from rich.table import Table

from fedimaging.datasets.site import resolve
from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation.custody import Custody, JobFacts, TaskInHand
from fedimaging.federation.gate import Gate
from fedimaging.federation.job import JobFolder
from fedimaging.federation.protocol import REPORT, to_parameters
from fedimaging.federation.session import Session
from fedimaging.governance.grants import grant_everything
from fedimaging.governance.ledger import PASSED, read_records
from fedimaging.training.declared import declare
from fedimaging.training.strategies import State, exchanged

JOB = Path(__file__).parents[2] / "jobs" / "chest_xray_fedavg"


class Clock:
    """Adds up the seconds of the calls that it times."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.calls = 0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start
        self.calls += 1


def result(session: Session, state: State, number: int, rounds: int) -> Shareable:
    """A round of training, as the client loop answers with it."""
    trained, metrics = session.train(state, number, rounds)
    meta = {
        MetaKey.INITIAL_METRICS: metrics,
        MetaKey.NUM_STEPS_CURRENT_ROUND: trained.cases,
        REPORT: session.figures(trained),
    }
    return DXO(DataKind.WEIGHTS, to_parameters(trained.sent), meta).to_shareable()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=480, help="images of the synthetic hospital")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = JobFolder(JOB).settings()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        local = folder / "local"
        local.mkdir()
        manifest = synthesize(folder / "data", hospitals=1, cases=arguments.images)[0]
        (local / "datasets.yml").write_text(f"{settings.dataset}: {{path: {manifest.parent}}}\n")
        grant_everything(local, [settings.dataset])
        session = Session(settings.to_dict(), "hospital-a", local, folder)
        job = JobFacts("job", JOB.name, "0" * 64, settings.dataset, "", "", signed=False)
        custody = Custody.current = Custody(
            site="hospital-a",
            folder=folder,
            local=local,
            job=job,
            declare=lambda: declare(settings),
            groups=session.groups,
        )
        gate, fl_ctx = Gate(), FLContext()
        cases = len(resolve(settings.dataset, "hospital-a", local).manifest.training)
        state = {key: value.clone() for key, value in exchanged(session.site.network.state_dict()).items()}
        result(session, state, 0, arguments.rounds)

        once = Clock()
        with once:
            declared = custody.declared
        whole, ours = [], {"consent": Clock(), "consent at each batch": Clock(), "gate and ledger": Clock()}

        def polled(task: TaskInHand) -> bool:
            with ours["consent at each batch"]:
                task.check()
            return False

        for number in range(arguments.rounds):
            start = time.perf_counter()
            with ours["consent"]:
                task = custody.open("train", number)
                task.ask()
            session.aborted = lambda task=task: polled(task)  # type: ignore[misc]
            shareable = result(session, state, number, arguments.rounds)
            task.entry.manifest = session.manifest_hash
            with ours["gate and ledger"]:
                gate.process(shareable, fl_ctx)
            whole.append(time.perf_counter() - start)
        assert [record["gate"] for record in read_records(folder)] == [PASSED] * arguments.rounds

    seconds = sum(whole)
    table = Table("part", "a round", "share of a round", title=f"{settings.network.name}, {cases} cases a round")
    for name, clock in ours.items():
        table.add_row(name, f"{1000 * clock.seconds / arguments.rounds:.2f} ms", f"{clock.seconds / seconds:.3%}")
    cost = sum(clock.seconds for clock in ours.values())
    table.add_row("all of it", f"{1000 * cost / arguments.rounds:.1f} ms", f"{cost / seconds:.2%}")
    table.add_row("a round", f"{statistics.median(whole):.2f} s", "")
    table.add_row(f"once a job: the {len(declared.update)} tensors declared", f"{1000 * once.seconds:.0f} ms", "")
    Console().print(table)


if __name__ == "__main__":
    main()
