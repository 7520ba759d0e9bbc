"""User-defined rewards: functions of a sample and a completion, named in the settings."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Sample

RewardFunction = Callable[[Sample, str], float]


class UserRewardError(RuntimeError):
    """Raised if a user's reward function fails. The message names the sample; the function's exception is the cause."""


@dataclass(frozen=True, slots=True)
class UserReward:
    """A user's reward function, and the name under which its values are reported: ``module:function``."""

    name: str
    function: RewardFunction

    def __call__(self, sample: Sample, completion: str) -> float:
        """Call the function. A failure ends the run, because scoring it as 0 would train the policy on a bug.

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
    """Load a reward function, which takes a sample and a completion and returns a number.

    Args:
        name: ``module:function``; the module must be importable.

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
        raise UserError(f"reward {name!r}: the module has no function {function_name}; define it or correct the name")
    try:
        inspect.signature(function).bind("sample", "completion")
    except TypeError as error:
        raise UserError(f"reward {name!r}: it is called as {function_name}(sample, completion), but {error}") from error
    return UserReward(name, function)
