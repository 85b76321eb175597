"""What two runs of one job have in common, read from the server's folder of each."""

import json

import pytest

TOLERANCE = 1e-6
"""relative, on losses and metrics of the same job, seed, data and number of threads

Training is deterministic. The means are summed in float64 in the order in which sites answer, and rounded to float32:
another order changes what is rounded by some 1e-16 of it, and with it one float32 in some 1e8. The runs of every job
agreed bit by bit wherever they were compared; the tolerance allows for such a last bit, and for nothing else.
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
    """Two server's folders: the same key metric, losses and metrics of each site round by round, and in the end."""
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


def _close(value):
    return value if value is None else pytest.approx(value, rel=TOLERANCE, abs=TOLERANCE)
