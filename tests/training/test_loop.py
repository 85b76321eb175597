"""The local loop on a toy task: it learns, is reproducible, stops, refuses, and exchanges what it should."""

import math

import numpy as np
import pytest
import torch

from fedimaging.errors import FedImagingError, Reason
from fedimaging.training.loop import AbortedError, Site, exchanged, plan_batches, schedule_factor
from fedimaging.training.settings import TrainingSettings


def initial(site):
    return exchanged({key: value.clone() for key, value in site.network.state_dict().items()})


def test_it_learns(toy, job):
    site = Site(job(norm="batch", epochs=3, batch_size=8), toy)
    state = initial(site)
    for round_number in range(3):
        result = site.train(state, round_number, 3)
        state = exchanged(result.state)
    assert site.metrics(state)["auroc"] > 0.9
    assert result.epoch_losses[-1] < 0.4
    assert (result.cases, result.steps) == (64, 24)


def test_the_seed_fixes_everything(tmp_path, toy, job):
    results = []
    for seed in (0, 0, 1):
        site = Site(job(seed=seed), toy)
        torch.manual_seed(len(results))
        results.append(site.train(initial(site), 0, 1))
    assert results[0].epoch_losses == results[1].epoch_losses != results[2].epoch_losses
    assert all(torch.equal(results[0].state[k], results[1].state[k]) for k in results[0].state)


def test_rounds_differ_in_order_and_start_the_optimizer_anew(toy, job):
    site = Site(job(), toy)
    state = initial(site)
    first, second = site.train(state, 0, 2), site.train(state, 1, 2)
    again = site.train(state, 0, 2)
    assert first.epoch_losses != second.epoch_losses
    assert first.epoch_losses == again.epoch_losses, "nothing of an earlier round may be left in the optimizer"


def test_batch_counters_stay_at_home_and_running_statistics_travel(toy, job):
    site = Site(job(norm="batch"), toy)
    state = initial(site)
    assert any("running_mean" in key for key in state)
    assert not any("num_batches_tracked" in key for key in state)
    assert all(value.dtype == torch.float32 for value in state.values())
    result = site.train(state, 0, 1)
    assert any("num_batches_tracked" in key for key in result.state)
    site.train(exchanged(result.state), 1, 2)


def test_it_stops_within_one_batch_of_being_told(toy, job):
    batches = []
    site = Site(job(batch_size=4), toy, aborted=lambda: len(batches) >= 2)
    state = initial(site)
    step = site._step
    site._step = lambda *arguments: (batches.append(1), step(*arguments))[1]
    with pytest.raises(AbortedError):
        site.train(state, 0, 1)
    assert len(batches) == 2


def test_a_loss_that_is_not_finite_is_refused(toy, job):
    site = Site(job(optimizer="sgd", learning_rate=10.0, momentum=0.99, gradient_clip=None, epochs=20), toy)
    with pytest.raises(FedImagingError, match="learning_rate") as caught:
        site.train(initial(site), 0, 1)
    assert caught.value.reason is Reason.NOT_FINITE


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_another_network_s_model_is_refused(toy, job, change):
    site = Site(job(), toy)
    state = initial(site)
    name = next(iter(state))
    if change == "missing":
        del state[name]
    elif change == "extra":
        state["backdoor.weight"] = torch.zeros(1)
    else:
        state[name] = torch.zeros(1)
    with pytest.raises(FedImagingError) as caught:
        site.train(state, 0, 1)
    assert caught.value.reason is Reason.BAD_MODEL


def test_unreadable_images_are_skipped_up_to_the_threshold_and_refused_above(toy, job):
    (toy.root / "training-3.png").write_bytes(b"not an image")
    with pytest.raises(FedImagingError, match=r"1 of 64 training images.*training-3\.png") as caught:
        Site(job(), toy).split("training")
    assert caught.value.reason is Reason.UNREADABLE_IMAGES
    site = Site(job(max_unreadable=0.02), toy)
    assert site.train(initial(site), 0, 1).cases == 63
    assert site.skipped() == 1


def test_an_evaluation_holds_no_name_of_a_case(toy, job):
    site = Site(job(), toy)
    figures = site.evaluation(initial(site))
    assert figures["cases"] == 24
    assert figures["classes"] == {"plain": 12, "disc": 12}
    assert not any(case.image in str(figures) or case.patient in str(figures) for case in toy.manifest.test)


def test_an_evaluated_model_is_not_run_twice(toy, job, monkeypatch):
    site = Site(job(), toy)
    state = initial(site)
    first = site.metrics(state)
    monkeypatch.setattr(site.task, "outcomes", lambda *_: pytest.fail("ran again"))
    assert site.metrics(state) == first


def test_bfloat16_gives_nearly_the_same_training(toy, job):
    states = [Site(job(precision=precision), toy) for precision in ("float32", "bfloat16")]
    losses = [site.train(initial(site), 0, 1).epoch_losses[0] for site in states]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0] != losses[1]


def test_batches_cover_each_case_once_and_leave_out_a_single_last_one():
    def sizes(cases, **settings):
        return plan_batches(cases, TrainingSettings(batch_size=8, **settings))

    assert sizes(16) == [8, 8]
    assert sizes(18) == [8, 8, 2]
    assert sizes(17) == [8, 8], "BatchNorm cannot be trained on one case"
    assert sizes(5) == [5]
    assert sizes(100, max_batches=2) == [8, 8]


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine", "constant"])
def test_schedules_stay_within_the_peak_and_end_low(schedule):
    values = np.array([schedule_factor(schedule, p) for p in np.linspace(0, 1, 101)])
    assert math.isclose(values.max(), 1.0)
    assert (values >= 0).all()
    if schedule != "constant":
        assert values[-1] < 1e-3
    if schedule == "one_cycle":
        assert values[0] == pytest.approx(1 / 25)
        assert values.argmax() == 30
