"""What two runs of one job have in common, read from the server's folder of each."""

import json

import pytest
import torch

TOLERANCE = 1e-6
"""relative, on metrics, losses and weights of the same job, seed, data and number of threads

Training is deterministic, and what is left is the order in which sites answer. A site's float32 weight times its number
of cases is exact in float64, and so is the sum over the sites unless one of them is some 2**20 times smaller than
another: another order changes the last bit of a rare weight at most. The runs compared so far agreed bit by bit.
"""


def events(folder):
    """The lines of a server's folder that are whole."""
    path = folder / "rounds.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def rounds(folder):
    return [event for event in events(folder) if event["event"] == "round"]


def evaluated(folder):
    """Every site's figures of every model in the cross-site evaluation."""
    return json.loads((folder / "cross_site_val/cross_val_results.json").read_text())


def assert_same_course(one, other):
    """Two server's folders: the same key metric, losses and metrics of each site round by round and in the end.

    The best and the last global model have the same weights.
    """
    assert len(rounds(one)) == len(rounds(other)) > 0
    for ours, theirs in zip(rounds(one), rounds(other), strict=True):
        assert ours["key_metric"] == _close(theirs["key_metric"]), f"round {ours['round']}"
        assert set(ours["sites"]) == set(theirs["sites"])
        for site, figures in ours["sites"].items():
            for name in ("cases", "loss", "epoch_losses", "metrics"):
                assert figures[name] == _close(theirs["sites"][site][name]), f"round {ours['round']}, {site}, {name}"
    ends = [next(event for event in events(folder) if event["event"] == "final") for folder in (one, other)]
    assert ends[0]["key_metric"] == _close(ends[1]["key_metric"])
    ours, theirs = evaluated(one), evaluated(other)
    assert set(ours) == set(theirs)
    for site, models in ours.items():
        assert set(models) == set(theirs[site])
        for model, figures in models.items():
            names = [name for name, value in figures.items() if isinstance(value, int | float) and name != "seconds"]
            assert names
            for name in names:
                assert figures[name] == _close(theirs[site][model][name]), f"{model} at {site}, {name}"

    for name in ("FL_global_model.pt", "best_FL_global_model.pt"):
        ours, theirs = (torch.load(folder / "app_server" / name, weights_only=True)["model"] for folder in (one, other))
        torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def _close(value):
    return value if value is None else pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
