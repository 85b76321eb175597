"""Strategies against closed forms: linear regression, whose loss is a quadratic, through the same loop as any task."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fedimaging.datasets.manifest import Case, Manifest
from fedimaging.datasets.site import Dataset
from fedimaging.errors import FedImagingError, Reason
from fedimaging.networks.base import NetworkSettings
from fedimaging.settings import parse
from fedimaging.tasks.base import Task, TaskSettings
from fedimaging.training.loop import Site, schedule_factor
from fedimaging.training.rounds import run_rounds
from fedimaging.training.settings import TrainingSettings
from fedimaging.training.strategies import CONTROL, batch_norm_names, exchanged, trainable

WIDTH = 3


class Linear(NetworkSettings):
    name: str = "Linear"

    def build(self, *, spatial_dims, in_channels, out_channels):
        return nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, 1, bias=False)).double()


class Normed(NetworkSettings):
    name: str = "Normed"

    def build(self, *, spatial_dims, in_channels, out_channels):
        return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 1)).double()


class Regression(Task):
    """Half the squared error of rows of numbers, so that the gradient is A^T (A w - b) / n."""

    key_metric, spatial_dims, in_channels, out_channels, input_shape = "fit", 2, 1, 1, (1, WIDTH)

    def __init__(self, rows):
        super().__init__(TaskSettings(name="regression"))
        self.rows = rows

    def check(self, manifest, where):
        pass

    def load(self, root, case):
        inputs, target = self.rows
        row = int(case.image.removeprefix("v"))
        return {"image": inputs[row].reshape(1, 1, WIDTH), "label": target[row]}

    def load_key(self):
        return "regression"

    def augmentation(self, seed):
        return lambda item: item

    def loss(self, cases):
        class HalfSquare(nn.Module):
            def forward(self, outputs, labels):
                return 0.5 * ((outputs.flatten().double() - labels) ** 2).mean()

        return HalfSquare()

    def outcomes(self, network, batch):
        return network(batch["image"])

    def metrics(self, outcomes, cases):
        _, target = self.rows
        return {"fit": -float(((outcomes.flatten() - target[: len(cases)]) ** 2).mean()), "cases": len(cases)}

    def evaluation(self, *arguments, **named):
        raise NotImplementedError

    def case_result(self, case, outcome):
        raise NotImplementedError


def problem(seed, cases, shift):
    """Rows (cases, WIDTH) and targets of a site whose own best weights differ from the others'."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(cases, WIDTH, generator=generator, dtype=torch.float64) * (1 + seed)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + shift
    return inputs, inputs @ weights


SIZES = (8, 24)
PROBLEMS = [problem(0, SIZES[0], 3.0), problem(1, SIZES[1], -1.0)]


def make_site(rows, strategy=None, *, name="a", network=None, keep=None, **training):
    cases = [Case(image=str(i), label="x", patient=str(i)) for i in range(len(rows[0]))]
    held_out = [Case(image=f"v{i}", label="x", patient=f"v{i}") for i in range(len(cases))]
    manifest = Manifest(
        name="toy", modality="OT", task="classification", classes=["x", "y"], training=cases, validation=held_out
    )
    settings = {
        "optimizer": "sgd", "momentum": 0.0, "weight_decay": 0.0, "gradient_clip": None, "schedule": "constant",
        "learning_rate": 0.05, "batch_size": 64, "precision": "float32", "strategy": strategy or {"name": "fedavg"},
    } | training  # fmt: skip
    job = SimpleNamespace(
        task=Regression(rows),
        network=network or Linear(),
        training=parse(TrainingSettings, settings, "training"),
        seed=0,
        deepest=lambda: [WIDTH],
    )
    dataset = Dataset("toy", name, Path(), Path("manifest.json"), manifest, "the test")
    return Site(job, dataset, keep=keep)


def message_of(site):
    """The server's first message to a site."""
    state = {name: value.clone() for name, value in exchanged(site.network.state_dict()).items()}
    return site.strategy.server(site.network).outgoing(state)


def sites(strategy=None, problems=PROBLEMS, **named):
    return [make_site(rows, strategy, name=str(i), **named) for i, rows in enumerate(problems)]


def weights_after(rounds, strategy=None, **named):
    *_, last = run_rounds(sites(strategy, **named), rounds)
    return last.weights["1.weight"].flatten()


def initial():
    return make_site(PROBLEMS[0]).network.state_dict()["1.weight"].flatten().clone()


def gradient(weights, rows):
    inputs, target = rows
    return inputs.T @ (inputs @ weights - target) / len(target)


def pooled(problems=PROBLEMS):
    return tuple(torch.cat(parts) for parts in zip(*problems, strict=True))


def optimum_of_means(problems=PROBLEMS):
    """The minimum of the mean of the sites' losses, sites counting alike."""
    hessians = [a.T @ a / len(b) for a, b in problems]
    return torch.linalg.solve(sum(hessians), sum(a.T @ b / len(b) for a, b in problems))


def close(a, b, tolerance=1e-5):
    """Equal up to the loop's float32 loss."""
    return torch.allclose(a.double(), b.double(), rtol=0, atol=tolerance)


def test_fedavg_is_the_mean_weighted_by_cases():
    for epochs in (1, 4):
        (only,) = run_rounds(sites(epochs=epochs), 1)
        own = [result.sent["1.weight"].flatten() for result in only.results]
        assert close(own[0], own[1], 1e-3) is False
        assert close(only.weights["1.weight"].flatten(), (8 * own[0] + 24 * own[1]) / 32)


def test_one_full_batch_step_of_fedavg_is_a_step_of_gradient_descent_on_all_data():
    w = initial()
    for _ in range(5):
        w = w - 0.05 * gradient(w, pooled())
    assert close(weights_after(5), w)


def test_fedavg_over_one_site_with_all_data_is_the_pooled_run():
    schedule = {"epochs": 3, "batch_size": 8, "schedule": "one_cycle", "optimizer": "adamw"}
    *_, federated = run_rounds([make_site(pooled(), **schedule)], 4)
    site = make_site(pooled(), **schedule)
    weights = exchanged(site.network.state_dict())
    for number in range(4):
        weights = exchanged(site.train(weights, number, 4).state)
    assert close(federated.weights["1.weight"], weights["1.weight"], 1e-12)


def test_a_steps_budget_is_kept_across_epochs():
    site = make_site(PROBLEMS[1], batch_size=8)
    result = site.train(exchanged(site.network.state_dict()), 0, 1, steps=7)
    assert (result.steps, result.cases, len(result.epoch_losses)) == (7, 24, 3)


def test_fedprox_without_a_pull_is_fedavg():
    assert torch.equal(weights_after(3, {"name": "fedprox", "mu": 0.0}, epochs=4), weights_after(3, epochs=4))


def test_fedprox_solves_its_own_quadratic_and_pulls_to_the_global_model():
    w0, rows = initial(), PROBLEMS[1]
    moved = []
    for mu in (0.0, 1.0, 10.0):
        site = make_site(rows, {"name": "fedprox", "mu": mu}, epochs=600, learning_rate=0.02)
        result = site.train(exchanged(site.network.state_dict()), 0, 1)
        hessian = rows[0].T @ rows[0] / len(rows[1])
        exact = torch.linalg.solve(hessian + mu * torch.eye(WIDTH), rows[0].T @ rows[1] / len(rows[1]) + mu * w0)
        assert close(result.sent["1.weight"].flatten(), exact)
        moved.append(float((exact - w0).norm()))
    assert moved[0] > moved[1] > moved[2]


def test_fedavg_stays_off_the_optimum_where_sites_differ_and_scaffold_reaches_it():
    equal = [problem(0, 16, 3.0), problem(1, 16, -1.0)]
    best = optimum_of_means(equal)
    settings = {"epochs": 10, "learning_rate": 0.05, "problems": equal}
    drifted = float((weights_after(60, **settings) - best).norm())
    corrected = float((weights_after(60, {"name": "scaffold"}, **settings) - best).norm())
    assert drifted > 0.1
    assert corrected < 1e-4


def test_scaffold_counts_sites_alike_whatever_their_cases():
    assert close(weights_after(60, {"name": "scaffold"}, epochs=10), optimum_of_means(), 1e-4)


def test_scaffold_s_control_variates_are_option_ii():
    strategy, steps, rate = {"name": "scaffold"}, 5, 0.05
    members = sites(strategy, epochs=steps)
    own, server = [torch.zeros(WIDTH).double() for _ in members], torch.zeros(WIDTH).double()
    w = initial()
    for step, record in enumerate(run_rounds(members, 3)):
        ends = []
        for i, rows in enumerate(PROBLEMS):
            y = w.clone()
            for _ in range(steps):
                y = y - rate * (gradient(y, rows) - own[i] + server)
            ends.append((y, own[i] - server + (w - y) / (steps * rate)))
        changes = [new - old for (_, new), old in zip(ends, own, strict=True)]
        for i, (y, new) in enumerate(ends):
            sent = record.results[i].sent
            assert close(sent["1.weight"].flatten(), y), step
            assert close(sent[f"{CONTROL}1.weight"].flatten(), changes[i])
            own[i] = new
        server, w = server + sum(changes) / 2, sum(y for y, _ in ends) / 2
        assert close(server, sum(own) / 2), "the server's control variate is the mean of the sites'"
        assert close(record.weights["1.weight"].flatten(), w)


def test_scaffold_s_control_variate_is_the_mean_gradient_under_a_schedule_too():
    site = make_site(PROBLEMS[0], {"name": "scaffold"}, epochs=6, schedule="one_cycle")
    w, total, weighted = initial(), 0.0, torch.zeros(WIDTH).double()
    result = site.train(site.receive(message_of(site)), 0, 1)
    for step in range(6):
        rate = 0.05 * schedule_factor("one_cycle", step / 6)
        g = gradient(w, PROBLEMS[0])
        w, total, weighted = w - rate * g, total + rate, weighted + rate * g
    assert close(result.sent[f"{CONTROL}1.weight"].flatten(), weighted / total)
    assert close(result.sent["1.weight"].flatten(), w)


def test_scaffold_moves_its_control_by_the_share_of_sites_that_answered():
    server = make_site(PROBLEMS[0], {"name": "scaffold"}).strategy.server(make_site(PROBLEMS[0]).network)
    weights = {"1.weight": torch.zeros(1, WIDTH).double()}
    mean = {"1.weight": torch.ones(1, WIDTH).double(), f"{CONTROL}1.weight": torch.full((1, WIDTH), 4.0)}
    server.update(weights, mean, share=0.25)
    assert torch.equal(server.controls["1.weight"], torch.ones(1, WIDTH).double())


@pytest.mark.parametrize("restarted", [False, True])
def test_scaffold_s_server_keeps_the_mean_of_the_sites_where_results_do_not_count(tmp_path, restarted):
    """In the first round the first site's result comes late, in the third the second one's is stopped at the gate."""
    keeps = [tmp_path / "a.pt", tmp_path / "b.pt"]

    def start():
        return [
            make_site(rows, {"name": "scaffold"}, name=str(i), epochs=2, keep=keep)
            for i, (rows, keep) in enumerate(zip(PROBLEMS, keeps, strict=True))
        ]

    members = start()
    server = members[0].strategy.server(members[0].network)
    weights, last = exchanged(members[0].network.state_dict()), [None, None]
    for number, counting in enumerate([(1,), (0, 1), (0,), (0, 1), ()]):
        message = server.outgoing(weights)
        members = start() if restarted else members
        states = [site.receive(message, counted) for site, counted in zip(members, last, strict=True)]
        own = [site.local.memory["1.weight"] for site in members]
        assert close(server.controls["1.weight"], sum(own) / 2), f"before round {number}"
        results = [site.train(state, number, 5) for site, state in zip(members, states, strict=True)]
        if counting:
            mean = {name: torch.stack([results[i].sent[name] for i in counting]).mean(0) for name in results[0].sent}
            weights = server.update(weights, mean, share=len(counting) / 2)
        last = [number if i in counting else counted for i, counted in enumerate(last)]
    assert float(server.controls["1.weight"].abs().max()) > 0.1


def test_a_site_that_lost_its_control_variate_says_so_and_stays_out():
    site = make_site(PROBLEMS[0], {"name": "scaffold"})
    with pytest.raises(FedImagingError, match="control variate of this site is lost") as caught:
        site.receive(message_of(site), counted=3)
    assert caught.value.reason is Reason.BAD_MODEL


def test_what_one_strategy_keeps_at_a_site_is_nothing_to_another(tmp_path):
    keep = tmp_path / "strategy.pt"
    first = make_site(PROBLEMS[0], {"name": "ditto"}, keep=keep)
    first.train(first.receive(message_of(first)), 0, 2)
    again = make_site(PROBLEMS[0], {"name": "ditto"}, keep=keep)
    assert torch.equal(again.local.memory["1.weight"], first.local.memory["1.weight"])
    other = make_site(PROBLEMS[0], {"name": "alone", "give_model": True}, keep=keep)
    assert not other.local.memory


def test_fedopt_with_plain_sgd_at_rate_one_is_fedavg():
    strategy = {"name": "fedopt", "optimizer": "sgd", "learning_rate": 1.0, "momentum": 0.0}
    assert close(weights_after(4, strategy, epochs=3), weights_after(4, epochs=3))


def test_fedopt_s_momentum_and_adam_are_the_papers():
    pseudo = [torch.tensor([[0.3, -0.2, 0.1]]), torch.tensor([[0.1, 0.4, -0.3]])]

    def steps(strategy):
        network = make_site(PROBLEMS[0]).network.float()
        server = parse(TrainingSettings, {"strategy": strategy}, "t").strategy.server(network)
        weights = {"1.weight": torch.zeros(1, WIDTH)}
        for change in pseudo:
            weights = server.update(weights, {"1.weight": weights["1.weight"] + change}, share=1.0)
        return weights["1.weight"]

    momentum = steps({"name": "fedopt", "optimizer": "sgd", "learning_rate": 0.5, "momentum": 0.9})
    assert close(momentum, 0.5 * pseudo[0] + 0.5 * (0.9 * pseudo[0] + pseudo[1]))
    adam = steps({"name": "fedopt", "optimizer": "adam", "learning_rate": 0.1, "momentum": 0.9, "epsilon": 0.01})
    expected, m, v = torch.zeros(1, WIDTH), torch.zeros(1, WIDTH), torch.zeros(1, WIDTH)
    for t, change in enumerate(pseudo, start=1):
        m, v = 0.9 * m + 0.1 * change, 0.99 * v + 0.01 * change**2
        expected = expected + 0.1 * (m / (1 - 0.9**t)) / ((v / (1 - 0.99**t)).sqrt() + 0.01)
    assert close(adam, expected)


def test_fedopt_averages_batchnorm_s_statistics():
    members = sites({"name": "fedopt", "optimizer": "adam", "learning_rate": 0.5}, network=Normed())
    (only,) = run_rounds(members, 1)
    for name in ("1.running_mean", "1.running_var"):
        sent = [result.sent[name] for result in only.results]
        assert close(only.weights[name], (8 * sent[0] + 24 * sent[1]) / 32)
    changed = (only.weights["2.weight"] - only.arrived["2.weight"]).abs()
    assert (changed > 0.3).all(), "Adam's first step is about its rate, whatever the gradient's size"


def test_fedbn_keeps_normalisation_at_the_site_and_leaves_the_others_alone():
    members = sites({"name": "fedbn"}, network=Normed(), epochs=3)
    own = batch_norm_names(members[0].network)
    assert own == {"1.weight", "1.bias", "1.running_mean", "1.running_var"}
    *_, last = run_rounds(members, 3)
    assert all(set(result.sent) == {"2.weight", "2.bias"} for result in last.results)
    start = exchanged(make_site(PROBLEMS[0], network=Normed()).network.state_dict())
    assert all(torch.equal(last.weights[name], start[name]) for name in own), "the server's copy stays the initial one"
    judged = [site.judged(last.weights) for site in members]
    assert all(torch.equal(judged[0][name], judged[1][name]) for name in ("2.weight", "2.bias"))
    assert not close(judged[0]["1.running_var"], judged[1]["1.running_var"], 1e-3)
    alone = make_site(PROBLEMS[0], {"name": "fedbn"}, network=Normed(), name="0", epochs=3)
    alone.train(last.arrived, 0, 3)
    before = {name: value.clone() for name, value in members[1].local.memory.items()}
    members[0].train(last.weights, 2, 3)
    assert all(torch.equal(members[1].local.memory[name], before[name]) for name in own)


def test_silobn_averages_scales_and_shifts_and_keeps_running_statistics_at_the_site():
    members = sites({"name": "fedbn", "keep": "statistics"}, network=Normed(), epochs=3)
    *_, last = run_rounds(members, 3)
    statistics = {"1.running_mean", "1.running_var"}
    assert all(set(result.sent) == {"1.weight", "1.bias", "2.weight", "2.bias"} for result in last.results)
    sent = [result.sent["1.weight"] for result in last.results]
    assert not close(sent[0], sent[1], 1e-3)
    assert close(last.weights["1.weight"], (SIZES[0] * sent[0] + SIZES[1] * sent[1]) / sum(SIZES))
    judged = [site.judged(last.weights) for site in members]
    for name, value in judged[0].items():
        assert torch.equal(value, judged[1][name]) is (name not in statistics)


def test_ditto_s_global_model_is_fedavg_s_and_the_personal_one_minimises_the_pulled_loss():
    mu, rounds = 0.5, 40
    members = sites({"name": "ditto", "mu": mu}, epochs=20)
    *_, last = run_rounds(members, rounds)
    assert close(last.weights["1.weight"].flatten(), weights_after(rounds, epochs=20))
    target = last.arrived["1.weight"].flatten()
    for site, (inputs, labels) in zip(members, PROBLEMS, strict=True):
        hessian = inputs.T @ inputs / len(labels)
        exact = torch.linalg.solve(hessian + mu * torch.eye(WIDTH), inputs.T @ labels / len(labels) + mu * target)
        assert close(site.judged(last.weights)["1.weight"].flatten(), exact)


def test_alone_is_each_site_s_own_training_and_nothing_of_it_is_sent():
    members = sites({"name": "alone"}, epochs=3)
    *_, last = run_rounds(members, 4)
    assert torch.equal(last.weights["1.weight"].flatten(), initial())
    assert all(result.sent == {} for result in last.results)
    for site, rows in zip(members, PROBLEMS, strict=True):
        w = initial()
        for _ in range(12):
            w = w - 0.05 * gradient(w, rows)
        assert close(site.judged(last.weights)["1.weight"].flatten(), w)


def test_a_personal_model_is_picked_on_the_site_s_own_validation():
    site = make_site(PROBLEMS[0], {"name": "ditto"})
    inputs, labels = PROBLEMS[0]
    good = {"1.weight": torch.linalg.lstsq(inputs, labels[:, None]).solution.T}
    bad = {"1.weight": torch.zeros(1, WIDTH).double()}
    site.local.memory = good
    site.validate(bad)
    site.local.memory = bad
    site.validate(bad)
    assert site.judged(bad, best=True) == good
    assert site.judged(bad) == bad


@pytest.mark.parametrize("name", ["scaffold", "fedbn", "ditto"])
def test_what_stays_at_the_site_outlives_the_process(tmp_path, name):
    keep = tmp_path / "strategy.pt"
    rows, network = PROBLEMS[0], Normed()
    first = make_site(rows, {"name": name}, network=network, keep=keep)
    message = message_of(first)
    weights = first.receive(message)
    first.train(weights, 0, 2)
    assert keep.stat().st_mode & 0o777 == 0o600
    second = make_site(rows, {"name": name}, network=network, keep=keep)
    results = [site.train(site.receive(message, counted=0), 1, 2) for site in (first, second)]
    assert all(torch.equal(results[0].sent[key], results[1].sent[key]) for key in results[0].sent)
    fresh = make_site(rows, {"name": name}, network=network)
    fresh.train(fresh.receive(message), 1, 2)
    assert any(not torch.equal(fresh.local.memory[key], value) for key, value in second.local.memory.items())


@pytest.mark.parametrize(
    "strategy",
    [
        *({"name": name} for name in ("fedavg", "fedprox", "scaffold", "fedopt", "fedbn", "ditto", "alone")),
        {"name": "fedbn", "keep": "statistics"},
    ],
    ids=lambda strategy: "-".join(strategy.values()),
)
def test_a_result_holds_exactly_what_the_strategy_says(strategy):
    site = make_site(PROBLEMS[0], strategy, network=Normed())
    message = message_of(site)
    result = site.train(site.receive(message), 0, 1)
    assert {key: value.shape for key, value in result.sent.items()} == site.strategy.sent(site.network)


@pytest.mark.parametrize("change", ["missing", "shape", "not finite"])
def test_scaffold_refuses_control_variates_of_another_network(change):
    site = make_site(PROBLEMS[0], {"name": "scaffold"})
    message = message_of(site)
    key = f"{CONTROL}{trainable(site.network)[0]}"
    if change == "missing":
        del message[key]
    else:
        message[key] = torch.zeros(7) if change == "shape" else message[key] + torch.nan
    with pytest.raises(FedImagingError, match=r"training\.strategy") as caught:
        site.receive(message)
    assert caught.value.reason is Reason.BAD_MODEL


@pytest.mark.parametrize("name", ["scaffold", "fedopt"])
def test_a_server_s_half_goes_on_after_a_restart(name):
    network = make_site(PROBLEMS[0]).network
    settings = parse(TrainingSettings, {"strategy": {"name": name}}, "t").strategy
    weights = {"1.weight": torch.zeros(1, WIDTH).double()}
    mean = {"1.weight": torch.ones(1, WIDTH).double(), f"{CONTROL}1.weight": torch.ones(1, WIDTH).double()}
    first, second = settings.server(network), settings.server(network)
    first.update(weights, mean, 1.0)
    second.load_state(first.state())
    halves = (first, second, settings.server(network))
    again = [half.outgoing(half.update(weights, mean, 1.0)) for half in halves]
    assert all(torch.equal(again[0][key], again[1][key]) for key in again[0])
    assert any(not torch.equal(again[0][key], again[2][key]) for key in again[0]), "a new half has no memory"
