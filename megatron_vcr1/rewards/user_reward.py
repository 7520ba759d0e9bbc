"""User-defined rewards: functions of a sample and a completion, named in the settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_vcr1.errors import UserError
from megatron_vcr1.types import RewardPart, Sample
from megatron_vcr1.user_modules import UserCodeError, call_user_code, import_user_module

RewardFunction = Callable[[Sample, str], float | RewardPart]


RESERVED_PARTS = ("total", "reasons", "extra", "overlong")
"""Names that a user's part cannot have, because metrics and rollout files use them otherwise."""


@dataclass(frozen=True, slots=True)
class UserReward:
    """A user's reward function.

    Attributes:
        part: name of the part of the reward: the name of one of the task's parts, which the function replaces, or
            another name, under which its values are added.
        source: the function as the settings name it, ``module:function``.
    """

    part: str
    source: str
    function: RewardFunction

    def __call__(self, sample: Sample, completion: str) -> RewardPart:
        """Call the function. A failure ends the run, because scoring it as 0 would train the policy on a bug.

        Raises:
            UserCodeError: the function raises an exception, or does not return a finite number.
        """
        where = f"sample {sample.id}: reward {self.source}"
        result = call_user_code(lambda: self.function(sample, completion), where)
        part = result if isinstance(result, RewardPart) else RewardPart(result)
        try:
            value = float(part.value)  # type: ignore[arg-type]  # also of NumPy and torch, which JSON cannot hold
        except (ArithmeticError, RuntimeError, TypeError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise UserCodeError(f"{where} returned {part.value!r}, not a finite number")
        return RewardPart(value, None if part.reason is None else str(part.reason))


def load_reward(name: str) -> UserReward:
    """Load a reward function, which takes a sample and a completion and returns a number or a `RewardPart`.

    Args:
        name: ``module:function``, or ``part=module:function`` to name the part of the reward. The module must be
            importable.

    Raises:
        UserError: the name is malformed, the module cannot be imported or has no such function, or the function does
            not accept these arguments.
    """
    part, equals, source = name.rpartition("=")
    module_name, _, function_name = source.partition(":")
    if (
        not (function_name.isidentifier() and all(word.isidentifier() for word in module_name.split(".")))
        or (equals and not part.strip().isidentifier())
        or part.strip() in RESERVED_PARTS
    ):
        raise UserError(
            f"reward {name!r}: write it as module:function or part=module:function, for instance my_rewards:brevity or "
            f"iou=my_rewards:soft_iou (part must not be {' or '.join(RESERVED_PARTS)})"
        )
    function = getattr(import_user_module(module_name, f"reward {name!r}"), function_name, None)
    if not callable(function) or inspect.isclass(function):  # decorated and partial functions are not isfunction
        raise UserError(f"reward {name!r}: the module has no function {function_name}; define it or correct the name")
    try:
        inspect.signature(function).bind("sample", "completion")
    except (TypeError, ValueError) as error:  # ValueError: some built-in functions have no signature
        raise UserError(f"reward {name!r}: it is called as {function_name}(sample, completion), but {error}") from error
    return UserReward(part.strip() or source, source, function)
