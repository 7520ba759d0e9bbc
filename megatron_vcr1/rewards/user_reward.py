"""A reward of the user's own: a plain function of a sample and a completion, named in the configuration."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vcr1.errors import UserError
from megatron_vcr1.types import VideoSample

RewardFunction = Callable[[VideoSample, str], float]


class UserRewardError(RuntimeError):
    """The user's function failed on a sample, which the message names; its own exception is the cause."""


@dataclass(frozen=True, slots=True)
class UserReward:
    """The user's function, and the name by which its values are reported."""

    name: str
    function: RewardFunction

    def __call__(self, sample: VideoSample, completion: str) -> float:
        """The function's value. A failure is no zero: it would teach the policy something.

        Raises:
            UserRewardError: the function raises, or returns something else than a finite number.
        """
        try:
            value = float(self.function(sample, completion))
        except Exception as error:
            raise UserRewardError(f"sample {sample.id}: reward {self.name} raised {error!r}") from error
        if not math.isfinite(value):
            raise UserRewardError(f"sample {sample.id}: reward {self.name} returned {value}, not a finite number")
        return value


def load_reward(name: str) -> UserReward:
    """Resolves ``module:function`` to a function that takes a sample and a completion and returns a number.

    Raises:
        UserError: the name has another form, the module cannot be imported, it has no such function, or the function
            takes other arguments.
    """
    module_name, _, function_name = name.partition(":")
    if not (function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"reward {name!r}: write it as module:function, for instance my_rewards:brevity")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise UserError(
            f"reward {name!r}: importing {module_name} raised {error!r}; "
            "if it is not found, install it or put its folder on PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        raise UserError(f"reward {name!r}: the module has no function {function_name}")
    try:
        inspect.signature(function).bind("sample", "completion")
    except TypeError as error:
        raise UserError(f"reward {name!r}: it is called as {function_name}(sample, completion), but {error}") from error
    return UserReward(name, function)
