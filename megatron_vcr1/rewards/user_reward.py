"""User-defined rewards: functions of a sample and a completion, named in the settings."""

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
    """A user's reward function failed on a sample; names the sample. The function's exception is the cause."""


@dataclass(frozen=True, slots=True)
class UserReward:
    """A user's reward function, and the name under which its values are reported."""

    name: str
    function: RewardFunction

    def __call__(self, sample: VideoSample, completion: str) -> float:
        """Call the function. A failure ends the run: a reward of 0 instead would train the policy on it.

        Raises:
            UserRewardError: the function raises, or does not return a finite number.
        """
        try:
            value = float(self.function(sample, completion))
        except Exception as error:
            raise UserRewardError(f"sample {sample.id}: reward {self.name} raised {error!r}") from error
        if not math.isfinite(value):
            raise UserRewardError(f"sample {sample.id}: reward {self.name} returned {value}, not a finite number")
        return value


def load_reward(name: str) -> UserReward:
    """Load the function ``module:function``, which takes a sample and a completion and returns a number.

    Raises:
        UserError: the name is malformed, the module cannot be imported or has no such function, or the function does
            not accept these arguments.
    """
    module_name, _, function_name = name.partition(":")
    if not (function_name.isidentifier() and all(part.isidentifier() for part in module_name.split("."))):
        raise UserError(f"reward {name!r}: write it as module:function, for instance my_rewards:brevity")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may raise any error
        raise UserError(
            f"reward {name!r}: importing {module_name} raised {error!r}; "
            "if the module was not found, install it or add its folder to PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not inspect.isfunction(function):
        raise UserError(f"reward {name!r}: the module has no function {function_name}")
    try:
        inspect.signature(function).bind("sample", "completion")
    except TypeError as error:
        raise UserError(f"reward {name!r}: it is called as {function_name}(sample, completion), but {error}") from error
    return UserReward(name, function)
