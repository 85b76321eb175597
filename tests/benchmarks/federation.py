"""What the federation costs over one process: time, start-up and idle time, bytes, memory.

Example: python tests/benchmarks/federation.py --rounds 5
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from fedimaging.datasets.site import resolve
from fedimaging.datasets.synthetic import synthesize
from fedimaging.federation.job import JobFolder
from fedimaging.simulator import make_workspace, simulator_command
from fedimaging.training.loop import Site, exchanged

REPOSITORY = Path(__file__).parents[2]
JOB = REPOSITORY / "jobs" / "chest_xray_fedavg"
SITES = 3


def loopback_bytes() -> int:
    """Bytes sent over the loopback interface since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    return 0


def federated(job: JobFolder, data: Path, folder: Path) -> tuple[list[dict[str, Any]], float, int]:
    """Runs the job by `nvflare simulator`. Returns its record, wall seconds and loopback bytes."""
    workspace = folder / "workspace"
    job.write(folder / "job")
    sites = make_workspace(workspace, data)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("FEDIMAGING_DATA", None)
    sent, start = loopback_bytes(), time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "nvflare.cli", *simulator_command(folder / "job", workspace, sites)],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    seconds, sent = time.monotonic() - start, loopback_bytes() - sent
    lines = (workspace / "server/simulate_job/rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], seconds, sent


def one_process(job: JobFolder, data: Path, rounds: int) -> list[float]:
    """The same optimizer steps and evaluations without FLARE, site after site. Returns the seconds of each round."""
    settings = job.settings()
    sites = []
    for name in sorted(path.name for path in data.iterdir() if path.is_dir()):
        local = data / name
        (local / "datasets.yml").write_text("chest_xray: {path: chest_xray}\n")
        site = Site(settings, resolve("chest_xray", name, local))
        for split in ("training", "validation", "test"):
            site.split(split)
        sites.append(site)
    state = {key: value.clone() for key, value in exchanged(sites[0].network.state_dict()).items()}
    seconds = []
    for round_number in range(rounds):
        start = time.monotonic()
        results = []
        for site in sites:
            site.metrics(state)
            results.append(site.train(state, round_number, rounds))
        total = sum(result.cases for result in results)
        state = {key: sum(result.state[key] * (result.cases / total) for result in results) for key in state}  # type: ignore[misc]
        seconds.append(time.monotonic() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, default=400, help="images of each site")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = folder / "data"
        synthesize(data, hospitals=SITES, cases=arguments.cases)
        job = JobFolder(JOB)
        job.override({"rounds": arguments.rounds})
        console.print(f"{SITES} sites with {arguments.cases} images, {arguments.rounds} rounds ...")
        (start, *rounds, _, end), wall, sent = federated(job, data, folder / "long")
        alone = one_process(job, data, arguments.rounds)
        job.override({"rounds": 2, "training.max_batches": 1})
        few = folder / "few"
        synthesize(few, hospitals=SITES, cases=40)
        _, near_zero, _ = federated(job, few, folder / "short")

    # The first round holds what belongs to the start: reading the images and compiling the first kernels.
    with_flare = statistics.median(record["seconds"] for record in rounds[1:])
    without = statistics.median(alone[1:])
    table = Table("measured", "value", title="The federation against one process")
    table.add_row("a round in the simulator, from the second on", f"{with_flare:.1f} s")
    table.add_row("the same steps and evaluations in one process", f"{without:.1f} s")
    table.add_row("ratio", f"{with_flare / without:.2f}x")
    table.add_row("whole job, start to end", f"{wall:.0f} s")
    table.add_row("two rounds of one batch, 40 images a site, start to end", f"{near_zero:.0f} s")
    models = 2 * SITES * (arguments.rounds + 1) + 2 * SITES
    table.add_row("model", f"{start['model_bytes'] / 2**20:.1f} MiB")
    table.add_row("a round's updates, as recorded", f"{rounds[0]['bytes_out'] + rounds[0]['bytes_in']:,} bytes")
    table.add_row("loopback bytes of the job against the models sent", f"{sent / (models * start['model_bytes']):.2f}x")
    table.add_row("peak memory of the server", f"{end['peak_memory']['server'] / 2**20:.0f} MiB")
    for site, peak in sorted(end["peak_memory"]["sites"].items()):
        table.add_row(f"peak memory of {site}", f"{peak / 2**20:.0f} MiB")
    console.print(table)


if __name__ == "__main__":
    main()
