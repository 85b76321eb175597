"""A federation in one process: the same rounds over the same sites, without a network between them.

With one site it is ordinary training; the baselines of a comparison, pooled and local-only, are run by it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from fedimaging.training.loop import RoundResult, Site
from fedimaging.training.strategies import State, exchanged


@dataclass(frozen=True)
class Round:
    """A round: the weights that arrived at the sites, what each site made of them, and the new weights."""

    arrived: State
    results: list[RoundResult]
    weights: State


def run_rounds(sites: Sequence[Site], rounds: int, *, steps: int | None = None) -> Iterator[Round]:
    """Runs the rounds of a job over sites of equal settings, from the seed's initial weights.

    Args:
        steps: optimizer steps of each site in a round; None for ``training.epochs``.
    """
    network = sites[0].network
    weights = {name: value.detach().cpu().clone() for name, value in exchanged(network.state_dict()).items()}
    server = sites[0].strategy.server(network)
    for number in range(rounds):
        message = server.outgoing(weights)
        counted = number - 1 if number else None
        results = [site.train(site.receive(message, counted), number, rounds, steps) for site in sites]
        counts = torch.tensor([1 if server.equal_weights else result.cases for result in results])
        mean = {
            name: torch.tensordot(counts.to(value) / counts.sum(), torch.stack([r.sent[name] for r in results]), dims=1)
            for name, value in results[0].sent.items()
        }
        arrived, weights = weights, server.update(weights, mean, share=1.0)
        yield Round(arrived, results, weights)
