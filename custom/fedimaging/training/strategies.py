"""What a federation does besides plain averaging: one setting of a job, ``training.strategy``, for site and server.

A strategy has two halves. :class:`Local` is a site's: what is added to the gradient, what leaves the site besides or
instead of the weights, and what stays. :class:`Server` is the server's: what becomes of the sites' mean. Both are plain
functions of state_dicts, so that the simulator, real sites and the closed forms of the tests run the same code.

A new strategy is a settings class with its two halves, and a line in ``Strategy``.
"""

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from fedimaging.errors import FedImagingError, Reason
from fedimaging.settings import Settings

State = dict[str, Tensor]
Fit = Callable[[State, "Local"], State]
"""trains the network for the round from a state under a strategy's local half; the state afterwards"""

CONTROL = "control/"
"""prefix of SCAFFOLD's control variates among the tensors of a message; no name of a weight holds a slash"""

_PENDING = "pending/"
"""prefix, in SCAFFOLD's memory, of control variates that stand for a result of which it is not known if it counted"""

_COUNTERS = "num_batches_tracked"


def exchanged(state: Mapping[str, Tensor]) -> State:
    """The part of a state_dict that is averaged: everything but BatchNorm's batch counters."""
    return {key: value for key, value in state.items() if not key.endswith(_COUNTERS)}


def trainable(network: nn.Module) -> list[str]:
    """Names of the parameters that an optimizer changes."""
    return [name for name, parameter in network.named_parameters() if parameter.requires_grad]


class StrategySettings(Settings):
    """Settings of a strategy; a subclass pins ``name`` and gives the two halves."""

    name: str
    personal: ClassVar[bool] = False
    """whether each site is judged by a model, or a part of one, that never leaves it"""

    @abstractmethod
    def local(self, network: nn.Module) -> "Local":
        """The site's half, new, for a network of the job."""

    def server(self, network: nn.Module) -> "Server":
        """The server's half, new, for a network of the job."""
        return Server()

    @property
    def submits(self) -> bool:
        """Whether a site gives its model to be evaluated elsewhere; never where a part of it is personal."""
        return not self.personal

    def sent(self, network: nn.Module) -> dict[str, torch.Size]:
        """Names and shapes of exactly the tensors that a site's training result holds."""
        return {name: value.shape for name, value in exchanged(network.state_dict()).items()}


class Local:
    """A site's half; this one is FedAvg's and does nothing besides the loss.

    ``memory`` is what the strategy keeps at the site from round to round.
    """

    def __init__(self) -> None:
        self.memory: State = {}

    def incoming(self, message: Mapping[str, Tensor]) -> State:
        """The weights of a message for training; whatever else it brings is taken in."""
        return dict(message)

    def settle(self, trained: int | None, counted: int | None) -> None:
        """Before a round: what became of this site's last result.

        Args:
            trained: the last round that this site trained in, None for none that it remembers.
            counted: the last round whose mean this site's result is in, None for none.
        """

    def start(self, weights: State) -> State:
        """What the round's training starts from, given the global weights."""
        return weights

    def judged(self, weights: State) -> State:
        """The model by which this site is judged when these global weights are."""
        return self.start(weights)

    def begin(self, network: nn.Module) -> None:
        """Before the first step of a round; the network holds the weights that training starts from."""

    def regularise(self, network: nn.Module) -> None:
        """Adds to the gradients what the strategy adds to the loss; before clipping."""

    def correct(self, network: nn.Module, rate: float) -> None:
        """Corrects the gradients of one step at a learning rate; after clipping."""

    def finish(self, network: nn.Module, trained: State) -> State:
        """After the last step: what is sent, of the trained state (exchanged part) and besides it."""
        return trained

    def personalise(self, weights: State, fit: Fit) -> None:
        """Trains what stays at the site, given the round's global weights."""


class Server:
    """The server's half; this one is FedAvg's (McMahan et al. 2017): the weighted mean replaces the weights."""

    equal_weights = False
    """whether sites count alike, not by their cases"""
    acknowledges = False
    """whether sites are told which of their results counted last"""

    def outgoing(self, weights: State) -> State:
        """The message that goes to the sites for training."""
        return weights

    def update(self, weights: State, mean: State, share: float) -> State:
        """The new weights.

        Args:
            weights: what the round started from.
            mean: mean over the sites' results; a weight that no site sends is not in it and stays.
            share: sites in the mean, of all that take part in the job, whether asked this round or not.
        """
        return {**weights, **mean}

    def state(self) -> dict[str, Any]:
        """What must be kept for a restart."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`state` gave."""


class FedAvg(StrategySettings):
    """McMahan et al. 2017: sites train, the server averages."""

    name: Literal["fedavg"] = "fedavg"

    def local(self, network: nn.Module) -> Local:
        return Local()


class Proximal(Local):
    """Adds mu/2 |w - w0|^2 to the loss, w0 being the weights that the round started from, or those given."""

    def __init__(self, mu: float, toward: State | None = None) -> None:
        super().__init__()
        self._mu, self._given = mu, toward
        self._toward: State = {}

    def begin(self, network: nn.Module) -> None:
        self._toward = {
            name: (parameter if self._given is None else self._given[name]).detach().clone().to(parameter)
            for name, parameter in network.named_parameters()
        }

    def regularise(self, network: nn.Module) -> None:
        for name, parameter in network.named_parameters():
            if parameter.grad is not None and self._mu:
                parameter.grad.add_(parameter.detach() - self._toward[name], alpha=self._mu)


class FedProx(StrategySettings):
    """Li et al. 2020: a proximal term holds the site's weights near the round's global ones."""

    name: Literal["fedprox"] = "fedprox"
    mu: Annotated[float, Field(ge=0, le=1000)] = 0.01
    """weight of the proximal term"""

    def local(self, network: nn.Module) -> Local:
        return Proximal(self.mu)


class Scaffold(StrategySettings):
    """Karimireddy et al. 2020, Option II: control variates take the sites' drift out of every step.

    As in the paper, local steps are plain SGD, and sites count alike in weights and control variates: what is minimised
    is the mean of the sites' losses.
    """

    name: Literal["scaffold"] = "scaffold"
    server_learning_rate: Annotated[float, Field(gt=0, le=10)] = 1.0
    """step of the server along the sites' mean change"""

    def local(self, network: nn.Module) -> Local:
        return ScaffoldLocal(network)

    def server(self, network: nn.Module) -> Server:
        return ScaffoldServer(network, self.server_learning_rate)

    def sent(self, network: nn.Module) -> dict[str, torch.Size]:
        parameters = dict(network.named_parameters())
        controls = {CONTROL + name: parameters[name].shape for name in trainable(network)}
        return super().sent(network) | controls


class ScaffoldLocal(Local):
    """Steps along g - c_i + c, then c_i+ = c_i - c + (x - y) / sum of the rates, of which the change is sent.

    With a constant rate the sum is K * eta as in the paper. With a schedule (x - y) / sum is the mean of the steps'
    directions weighted by their rates.

    The server's c is the mean of the sites' c_i only if a change that it never took in (late, stopped at the gate,
    refused) is none here either. So c_i+ waits until the next message says whether the result counted.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        parameters = dict(network.named_parameters())
        self._names = trainable(network)
        self.memory = {name: torch.zeros_like(parameters[name], device="cpu") for name in self._names}
        self._server: State = {}
        self._start: State = {}
        self._rates = 0.0

    def incoming(self, message: Mapping[str, Tensor]) -> State:
        self._server = {name: _pick(message, CONTROL + name, self.memory[name]) for name in self._names}
        return {key: value for key, value in message.items() if not key.startswith(CONTROL)}

    def settle(self, trained: int | None, counted: int | None) -> None:
        if counted is not None and trained is None:
            raise FedImagingError(
                "SCAFFOLD's control variate of this site is lost (strategy.pt in the job's run directory); the server "
                "still counts with it, so this site takes no further part in the job",
                Reason.BAD_MODEL,
            )
        pending = {name: self.memory.pop(_PENDING + name) for name in self._names if _PENDING + name in self.memory}
        if counted == trained:
            self.memory |= pending

    def begin(self, network: nn.Module) -> None:
        parameters = dict(network.named_parameters())
        self._start = {name: parameters[name].detach().clone() for name in self._names}
        self._shift = {n: (self._server[n] - self.memory[n]).to(parameters[n]) for n in self._names}
        self._rates = 0.0

    def correct(self, network: nn.Module, rate: float) -> None:
        for name, parameter in network.named_parameters():
            if name in self._shift and parameter.grad is not None:
                parameter.grad.add_(self._shift[name])
        self._rates += rate

    def finish(self, network: nn.Module, trained: State) -> State:
        parameters, changes = dict(network.named_parameters()), {}
        for name in self._names:
            moved = (self._start[name] - parameters[name].detach()) / self._rates
            changes[CONTROL + name] = moved.cpu() - self._server[name]
            self.memory[_PENDING + name] = self.memory[name] + changes[CONTROL + name]
        return trained | changes


class ScaffoldServer(Server):
    """x + rate * (mean - x), and c + share * the mean change of the sites' control variates."""

    equal_weights = acknowledges = True

    def __init__(self, network: nn.Module, rate: float) -> None:
        parameters = dict(network.named_parameters())
        self._rate = rate
        self.controls = {name: torch.zeros_like(parameters[name], device="cpu") for name in trainable(network)}

    def outgoing(self, weights: State) -> State:
        return weights | {CONTROL + name: value for name, value in self.controls.items()}

    def update(self, weights: State, mean: State, share: float) -> State:
        self.controls = {name: c + share * _pick(mean, CONTROL + name, c) for name, c in self.controls.items()}
        stepped = {n: torch.lerp(weights[n], mean[n], self._rate) for n in self.controls}
        return {**weights, **{n: value for n, value in mean.items() if not n.startswith(CONTROL)}, **stepped}

    def state(self) -> dict[str, Any]:
        return {"controls": self.controls}

    def load_state(self, state: dict[str, Any]) -> None:
        self.controls = state["controls"]


class FedOpt(StrategySettings):
    """Reddi et al. 2021: the server takes the sites' mean change as a gradient and lets an optimizer step along it.

    BatchNorm's running statistics are no parameters; they are averaged.
    """

    name: Literal["fedopt"] = "fedopt"
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd with momentum is FedAvgM (Hsu et al. 2019); adam is FedAdam, here with torch's correction of its bias"""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1.0
    """of the server's optimizer"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """of sgd; beta 1 of adam"""
    epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """of adam: how adaptive it is (tau in the paper); beta 2 is 0.99"""

    def local(self, network: nn.Module) -> Local:
        return Local()

    def server(self, network: nn.Module) -> Server:
        return FedOptServer(network, self)


class FedOptServer(Server):
    """One of torch's optimizers over copies of the parameters, with weights less mean as their gradient."""

    def __init__(self, network: nn.Module, settings: FedOpt) -> None:
        parameters = dict(network.named_parameters())
        self._parameters = {name: nn.Parameter(parameters[name].detach().cpu().clone()) for name in trainable(network)}
        steps, rate = self._parameters.values(), settings.learning_rate
        self._optimizer: torch.optim.Optimizer
        if settings.optimizer == "sgd":
            self._optimizer = torch.optim.SGD(steps, lr=rate, momentum=settings.momentum)
        else:
            self._optimizer = torch.optim.Adam(steps, lr=rate, betas=(settings.momentum, 0.99), eps=settings.epsilon)

    def update(self, weights: State, mean: State, share: float) -> State:
        for name, parameter in self._parameters.items():
            parameter.data.copy_(weights[name])
            parameter.grad = weights[name] - mean[name]
        self._optimizer.step()
        return {**weights, **mean, **{name: p.detach().clone() for name, p in self._parameters.items()}}

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(self._optimizer.state_dict())

    def load_state(self, state: dict[str, Any]) -> None:
        self._optimizer.load_state_dict(copy.deepcopy(state))


class FedBN(StrategySettings):
    """Li et al. 2021: BatchNorm stays at the site, everything else is averaged.

    With ``keep`` "statistics" it is SiloBN (Andreux et al. 2020): scales and shifts are averaged too.
    """

    name: Literal["fedbn"] = "fedbn"
    personal = True
    keep: Literal["all", "statistics"] = "all"
    """what of BatchNorm stays at the site: all of it, or the running statistics only (SiloBN)"""

    def local(self, network: nn.Module) -> Local:
        return FedBNLocal(self._kept(network))

    def sent(self, network: nn.Module) -> dict[str, torch.Size]:
        kept = self._kept(network)
        return {name: shape for name, shape in super().sent(network).items() if name not in kept}

    def _kept(self, network: nn.Module) -> set[str]:
        names = batch_norm_names(network)
        return names if self.keep == "all" else names - set(trainable(network))


class FedBNLocal(Local):
    """Keeps a part of the site's model, by name; before the first round it is the initial model's."""

    def __init__(self, kept: set[str]) -> None:
        super().__init__()
        self._kept = kept

    def start(self, weights: State) -> State:
        return {**weights, **self.memory}

    def finish(self, network: nn.Module, trained: State) -> State:
        self.memory = {name: value for name, value in trained.items() if name in self._kept}
        return {name: value for name, value in trained.items() if name not in self._kept}


def batch_norm_names(network: nn.Module) -> set[str]:
    """Names of all that BatchNorm layers hold, without their counters."""
    return {
        f"{name}.{key}"
        for name, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for key in exchanged(module.state_dict())
    }


class Ditto(StrategySettings):
    """Li et al. 2021: besides FedAvg each site trains a model of its own, held near the global one.

    The personal model takes as many steps a round as the global one, so a round costs twice the time.
    """

    name: Literal["ditto"] = "ditto"
    personal = True
    mu: Annotated[float, Field(ge=0, le=1000)] = 0.1
    """the paper's lambda"""

    def local(self, network: nn.Module) -> Local:
        return DittoLocal(self.mu)


class DittoLocal(Local):
    """FedAvg's half, and the personal model in ``memory``; before the first round it is the global one."""

    def __init__(self, mu: float) -> None:
        super().__init__()
        self._mu = mu

    def judged(self, weights: State) -> State:
        return self.memory or weights

    def personalise(self, weights: State, fit: Fit) -> None:
        self.memory = fit(self.memory or weights, Proximal(self._mu, toward=weights))


class Alone(StrategySettings):
    """Each site trains by itself, for comparison: of its training only metrics leave."""

    name: Literal["alone"] = "alone"
    personal = True
    give_model: bool = False
    """whether a site's best model is given for the other sites to evaluate"""

    @property
    def submits(self) -> bool:
        return self.give_model

    def local(self, network: nn.Module) -> Local:
        return AloneLocal()

    def sent(self, network: nn.Module) -> dict[str, torch.Size]:
        return {}


class AloneLocal(Local):
    """Goes on from the site's own weights; before the first round they are the initial model's."""

    def start(self, weights: State) -> State:
        return self.memory or weights

    def finish(self, network: nn.Module, trained: State) -> State:
        self.memory = trained
        return {}


DEFAULT_STRATEGY: dict[str, Any] = {"name": "fedavg"}
Strategy = Annotated[FedAvg | FedProx | Scaffold | FedOpt | FedBN | Ditto | Alone, Field(discriminator="name")]


def _pick(message: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    value = message.get(name)
    if value is None or value.shape != like.shape or not torch.isfinite(value).all():
        raise FedImagingError(
            "the message lacks SCAFFOLD's control variates, or they are not of the job's network; server and site "
            "disagree on training.strategy",
            Reason.BAD_MODEL,
        )
    return value.to(like)
