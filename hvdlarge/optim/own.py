"""Optimizers of the user's own: any subclass of torch.optim.Optimizer, under the engine's contract.

A subclass is derived that Horovod can re-create from parameter groups alone, and that leaves
tensors without a gradient alone (interface.py). Before it is used, it takes some steps on small
tensors of its own, which show what would break a run later: results that depend on more than
gradients, parameter groups and saved state.
"""

from __future__ import annotations

import collections
import inspect
import math
import pickle
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from hvdlarge.data.rng import seed_all
from hvdlarge.optim.interface import GradientNorms, MeanGradientOptimizer
from hvdlarge.optim.torch_optimizers import TorchOptimizer


class OptimizerRefused(ValueError):
    """A class that cannot keep the laws of the engine; the message gives the reason."""


class _OwnOptimizer(TorchOptimizer):
    """Moves the weights as the own class among its bases does.

    State that the class fills when it is built is handed to a tensor when it first moves: Horovod
    takes no optimizer that has state, and a checkpoint holds that of moved tensors only.
    """

    _initial_state: Mapping[torch.Tensor, Mapping[str, Any]] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in interface.py."""
        if "lr" not in self.defaults:
            raise OptimizerRefused(_not_in_defaults("lr"))
        super().add_param_group(param_group)

    def set_state_aside(self) -> None:
        """Take the state that the class is built with."""
        self._initial_state = {weight: state for weight, state in self.state.items() if state}
        self.state.clear()

    def _update_measured(self, norms: GradientNorms) -> None:
        for weight in norms.gradients:
            if weight in self._initial_state and not self.state.get(weight):
                self.state[weight] = {
                    key: value.clone() if isinstance(value, torch.Tensor) else value
                    for key, value in self._initial_state[weight].items()
                }
        super()._update_measured(norms)


def _not_in_defaults(key: str) -> str:
    return f"it has no {key!r} among the defaults of its parameter groups, where the engine sets it"


def own_optimizer(
    kind: Any, groups: list[dict[str, Any]], arguments: Mapping[str, Any], weight_decay: float
) -> MeanGradientOptimizer:
    """An optimizer of an own class over `groups`.

    Args:
        kind: the class.
        groups: parameter groups, as param_groups.py gives them.
        arguments: keyword arguments of the class, without the parameters, `lr` and `weight_decay`.
        weight_decay: of the job, ≥ 0; passed on if the class takes it.

    Raises:
        OptimizerRefused: for something that is no optimizer, arguments that do not fit, or a class
            that cannot keep the laws; whatever the class itself raises is raised as it is.
    """
    _refuse_other_kinds(kind)
    derived = _derived(kind, _arguments(kind, arguments, weight_decay))
    _try_out(derived, groups, takes_weight_decay=weight_decay > 0)
    return derived(groups)


def _refuse_other_kinds(kind: Any) -> None:
    if not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise OptimizerRefused("it is not a subclass of torch.optim.Optimizer")
    if kind.step is torch.optim.Optimizer.step:
        raise OptimizerRefused("it has no step() of its own")
    closure = list(inspect.signature(kind.step).parameters.values())[1:2]
    if closure and closure[0].default is closure[0].empty and closure[0].kind in _POSITIONAL:
        raise OptimizerRefused(
            f"its step() needs {closure[0].name!r}, to compute the loss again: the engine computes "
            "each micro-batch once, and averages gradients over the workers before the update"
        )


_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def _arguments(kind: Any, given: Mapping[str, Any], weight_decay: float) -> dict[str, Any]:
    """All keyword arguments of a class, compared with its signature."""
    taken = {
        "params": "the engine gives it the model's parameters",
        "lr": "the learning rate is set in each step by the section lr",
        "weight_decay": "give optimizer.weight_decay",
    }
    for name, instead in taken.items():
        if name in given:
            raise OptimizerRefused(f"args.{name}: {instead}")
    signature = inspect.signature(kind)
    parameters = signature.parameters
    arguments = dict(given)
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if "lr" in parameters and not isinstance(parameters["lr"].default, (int, float)):
        arguments["lr"] = 1e-3  # replaced before each step
    if "weight_decay" in parameters or (takes_any and weight_decay):
        arguments["weight_decay"] = weight_decay
    elif weight_decay:
        raise OptimizerRefused(
            f"optimizer.weight_decay is {weight_decay:g}, but the class takes no weight_decay"
        )
    try:
        signature.bind([], **arguments)
    except TypeError as error:
        shown = ", ".join(given) or "none"
        raise OptimizerRefused(f"the arguments ({shown}) do not fit {signature}: {error}") from None
    return arguments


def _derived(kind: Any, arguments: Mapping[str, Any]) -> Any:
    """A class that is built from parameter groups alone, which is how Horovod re-creates it."""
    # One that measures and updates by itself keeps the engine's rules by itself
    bases = (kind,) if issubclass(kind, MeanGradientOptimizer) else (_OwnOptimizer, kind)

    def build(self: Any, params: Any) -> None:
        kind.__init__(self, params, **arguments)
        if isinstance(self, _OwnOptimizer):
            self.set_state_aside()

    # state_on_cpu: the names of state that is on the CPU whatever the weights' device, once the
    # class has been tried out
    members = {"__init__": build, "__doc__": kind.__doc__, "state_on_cpu": frozenset()}
    return type(kind.__name__, bases, members)


# --- trying out


class _Trial:
    """Small tensors like those of the groups, and an optimizer over them."""

    def __init__(self, kind: Any, groups: list[dict[str, Any]], seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        small = []
        for group in groups:
            like = {weight.dim(): weight for weight in reversed(group["params"])}
            members = [self._small(weight) for weight in like.values() for _ in range(2)]
            names = [f"weight {number}" for number in range(len(members))]
            small.append({**group, "params": members, "names": names})
        self.weights: list[torch.nn.Parameter] = [w for group in small for w in group["params"]]
        self.optimizer: MeanGradientOptimizer = kind(small)

    def _small(self, like: torch.Tensor) -> torch.nn.Parameter:
        shape = [min(size, 3) for size in like.shape]
        return torch.nn.Parameter(self._drawn(shape).to(like.device, like.dtype))

    def _drawn(self, shape: Any) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64)

    def step(self, number: int, seed: int, resting: bool = False) -> None:
        """Take a step with gradients that depend on its number; seed the global generators first,
        and leave the first tensor without a gradient if it is `resting`.
        """
        self._generator.manual_seed(1000 + number)
        for weight in self.weights:
            weight.grad = self._drawn(weight.shape).to(weight.device, weight.dtype)
        if resting:
            self.weights[0].grad = torch.zeros_like(self.weights[0])
        seed_all(seed)
        self.optimizer.update(self.optimizer.measure(), 0.01 / (number + 1))

    def take_over(self, other: _Trial) -> None:
        """Go on from the weights and the saved state of another."""
        for weight, its in zip(self.weights, other.weights, strict=True):
            weight.data.copy_(its.data)
            for key, value in other.optimizer.state.get(its, {}).items():
                copied = value.clone() if isinstance(value, torch.Tensor) else value
                self.optimizer.state[weight][key] = copied

    def values(self) -> list[Any]:
        """Weights and state, to be compared."""
        state = self.optimizer.state
        return [(_frozen(weight), _frozen(dict(state.get(weight, {})))) for weight in self.weights]

    def surroundings(self) -> dict[str, Any]:
        """What the optimizer holds besides weights and state, by the words of a message."""
        groups = {
            f"the parameter groups' {key!r}": _frozen([g[key] for g in self.optimizer.param_groups])
            for key in self.optimizer.param_groups[0].keys() - {"params", "lr"}
        }
        if not isinstance(self.optimizer, _OwnOptimizer):
            return groups  # an engine's optimizer may keep figures of its last step
        return groups | {
            f"its attribute {name!r}": _frozen(value)
            for name, value in vars(self.optimizer).items()
            if name not in _OF_TORCH and not name.startswith(("_optimizer_", "_warned_"))
        }


_OF_TORCH = {"state", "param_groups", "defaults", "_zero_grad_profile_name", "_initial_state"}


def _try_out(kind: Any, groups: list[dict[str, Any]], takes_weight_decay: bool) -> None:
    """Take some steps on small tensors.

    Raises:
        OptimizerRefused: if they show that the laws would not hold.
    """
    with _generators_kept():
        trial = _Trial(kind, groups, seed=1)
        _check_built(trial, _Trial(kind, groups, seed=2), takes_weight_decay)
        before = trial.surroundings()
        _rest(trial, 0)
        trial.step(1, seed=1)
        _rest(trial, 2)
        for what, value in trial.surroundings().items():
            if before.get(what) != value:
                raise OptimizerRefused(
                    f"a step changes {what}, which no checkpoint holds: keep it in self.state of "
                    "each parameter, as a tensor or a number"
                )
        _check_savable(trial)
        resumed = _Trial(kind, groups, seed=3)
        resumed.take_over(trial)
        for number, seed, other_seed, problem in (
            (3, 3, 3, _NOT_RESUMED), (4, 4, 4, _NOT_RESUMED), (5, 5, 6, _DRAWS)
        ):  # fmt: skip
            trial.step(number, seed)
            resumed.step(number, other_seed)
            if trial.values() != resumed.values():
                raise OptimizerRefused(problem)
        kind.state_on_cpu = frozenset(
            key
            for weight, state in trial.optimizer.state.items()
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.device.type == "cpu" != weight.device.type
        )


_NOT_RESUMED = (
    "the same step from the same saved state gives a different result: it keeps something outside "
    "self.state, or draws from a random generator of its own"
)
_DRAWS = "its step draws random numbers, which would differ from worker to worker"


def _check_built(trial: _Trial, other: _Trial, takes_weight_decay: bool) -> None:
    optimizer = trial.optimizer
    if takes_weight_decay and "weight_decay" not in optimizer.defaults:
        raise OptimizerRefused(_not_in_defaults("weight_decay"))
    if optimizer.state:
        raise OptimizerRefused("it has state before its first step")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise OptimizerRefused(
            "it registers hooks on its own step(), which the engine does not run"
        )
    states = [
        [_frozen(getattr(each.optimizer, "_initial_state", {}).get(w)) for w in each.weights]
        for each in (trial, other)
    ]
    if states[0] != states[1]:
        raise OptimizerRefused(
            "the state that it is built with depends on the weights, which a resume loads later"
        )


def _rest(trial: _Trial, number: int) -> None:
    before = trial.values()[0]
    trial.step(number, seed=number, resting=True)
    if trial.values()[0] != before:
        raise OptimizerRefused(
            "it moves a parameter whose .grad is None, or changes its state: skip it, as torch's "
            "own optimizers do"
        )


def _check_savable(trial: _Trial) -> None:
    known = {id(weight) for weight in trial.weights}
    for weight, state in trial.optimizer.state.items():
        if id(weight) not in known:
            raise OptimizerRefused(
                f"self.state has the key {weight!r}, which is no parameter: a checkpoint holds the "
                "state of parameters"
            )
        for key, value in state.items():
            if not isinstance(key, str):
                raise OptimizerRefused(f"self.state has the key {key!r}, which is not a string")
            if not _is_savable(value):
                raise OptimizerRefused(
                    f"self.state has {key!r}, a {type(value).__name__}: a checkpoint holds dense "
                    "tensors, numbers and strings"
                )


def _is_savable(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.layout is torch.strided and not value.is_quantized
    return value is None or type(value) in (bool, int, float, str)


def _frozen(value: Any, depth: int = 6) -> Any:
    """A value to compare with a later one: equal only if nothing in it has changed."""
    if isinstance(value, torch.Tensor):
        plain = value.detach().cpu()
        plain = plain.to_dense() if plain.layout is not torch.strided else plain
        raw = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return (str(value.dtype), tuple(value.shape), raw)
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, float):
        return "nan" if math.isnan(value) else value
    if depth and isinstance(value, Mapping):
        keys = [id(key) if isinstance(key, torch.Tensor) else key for key in value]
        return dict(zip(keys, (_frozen(each, depth - 1) for each in value.values()), strict=True))
    if isinstance(value, (set, frozenset)):
        return frozenset(map(repr, value))
    if depth and isinstance(value, (list, tuple, collections.deque)):
        return [_frozen(each, depth - 1) for each in value]
    if depth and hasattr(value, "__dict__") and not callable(value):
        return (type(value).__name__, _frozen(vars(value), depth - 1))
    if isinstance(value, (int, complex, str, bytes, type(None))):
        return value
    if callable(value):
        return repr(type(value))
    try:
        return pickle.dumps(value)
    except Exception:  # whatever its class raises: such as a lock, which is not saved either
        return repr(type(value))


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the global random generators back to where they were."""
    on_gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu)
