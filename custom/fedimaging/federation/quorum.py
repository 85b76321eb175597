"""Who must contribute to a round, and whether that can still happen."""

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Quorum:
    """A round counts if at least ``min_clients`` sites contribute, all ``required_sites`` among them."""

    min_clients: int
    required_sites: frozenset[str] = frozenset()

    def met(self, contributed: Collection[str]) -> bool:
        return len(contributed) >= self.min_clients and self.required_sites <= set(contributed)

    def shortfall(self, contributed: Collection[str], outstanding: Collection[str] = ()) -> str | None:
        """What the round lacks even if every ``outstanding`` site still contributes; None if nothing."""
        possible = {*contributed, *outstanding}
        if absent := sorted(self.required_sites - possible):
            return f"nothing came from {', '.join(absent)}, which must take part"
        if len(possible) < self.min_clients:
            return f"only {len(possible)} of the {self.min_clients} sites needed contributed"
        return None
