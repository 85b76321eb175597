"""A round counts with enough sites and all required ones, and is given up as soon as it cannot."""

from fedimaging.federation.quorum import Quorum


def test_a_round_counts_with_enough_sites_and_all_required_ones():
    quorum = Quorum(2, frozenset({"hospital-a"}))
    assert quorum.met(["hospital-a", "hospital-b"])
    assert not quorum.met(["hospital-a"])
    assert not quorum.met(["hospital-b", "hospital-c"]), "a required site is missing"


def test_a_round_is_given_up_only_when_no_outstanding_site_can_save_it():
    quorum = Quorum(2, frozenset({"hospital-a"}))
    assert quorum.shortfall([], ["hospital-a", "hospital-b"]) is None
    assert quorum.shortfall(["hospital-b"], ["hospital-a"]) is None
    assert quorum.shortfall(["hospital-b", "hospital-c"]) == "nothing came from hospital-a, which must take part"
    assert quorum.shortfall(["hospital-a"]) == "only 1 of the 2 sites needed contributed"
