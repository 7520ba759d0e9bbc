"""An Adam for megatron-core's optimizers, for machines without TransformerEngine and Apex.

On such machines megatron-core falls back to torch.optim.AdamW, which counts steps per parameter. But megatron-core's
distributed optimizer saves and restores one step count per parameter group, because the fused optimizers of
TransformerEngine and Apex count that way. So a run with torch.optim.AdamW could not be resumed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

_MOMENTS = ("exp_avg", "exp_avg_sq")
_CHUNK_SIZE = 2**26  # values whose moments are converted at a time: two float32 copies of 256 MiB


class Adam(torch.optim.Optimizer):
    """torch's fused AdamW, with one step count per parameter group.

    Moments may be stored in a lower precision than the parameters'. They are converted to it and back in each step, a
    part of a parameter at a time.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        capturable: bool = False,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take the arguments that megatron-core passes to a fused Adam. `capturable`, for CUDA graphs, is ignored.

        Args:
            exp_avg_dtype: data type of the first moments.
            exp_avg_sq_dtype: data type of the second moments.

        Raises:
            ValueError: `adam_w_mode` is False; only decoupled weight decay (AdamW) is implemented.
        """
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is implemented; set adam_w_mode=True")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.moment_dtypes = dict(zip(_MOMENTS, (exp_avg_dtype, exp_avg_sq_dtype), strict=True))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update the parameters that have a gradient. `closure` is ignored."""
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if not self.state[parameter]:
                    self.state[parameter] = {
                        name: torch.zeros_like(parameter, dtype=dtype) for name, dtype in self.moment_dtypes.items()
                    }
            # Without a conversion, all parameters of the group are updated by one call.
            if all(
                self.state[parameter][name].dtype == parameter.dtype for parameter in parameters for name in _MOMENTS
            ):
                self._update(
                    group,
                    parameters,
                    [parameter.grad for parameter in parameters],
                    *([self.state[parameter][name] for parameter in parameters] for name in _MOMENTS),
                )
            else:
                for parameter in parameters:
                    self._update_in_chunks(group, parameter)
            group["step"] = group.get("step", 0) + 1

    def _update_in_chunks(self, group: dict[str, Any], parameter: Tensor) -> None:
        """Update a parameter whose moments are stored in another precision."""
        assert parameter.grad is not None
        values, gradient = parameter.view(-1), parameter.grad.view(-1)
        moments = [self.state[parameter][name].view(-1) for name in _MOMENTS]
        for start in range(0, parameter.numel(), _CHUNK_SIZE):
            chunk = slice(start, start + _CHUNK_SIZE)
            stored = [moment[chunk] for moment in moments]
            converted = [moment.to(parameter.dtype) for moment in stored]  # a view of those that need no conversion
            self._update(group, [values[chunk]], [gradient[chunk]], *([moment] for moment in converted))
            for moment, result in zip(stored, converted, strict=True):
                if moment.dtype != result.dtype:
                    moment.copy_(result)

    @staticmethod
    def _update(
        group: dict[str, Any],
        parameters: list[Tensor],
        gradients: list[Tensor],
        exp_avgs: list[Tensor],
        exp_avg_sqs: list[Tensor],
    ) -> None:
        """Do the step after `group["step"]` with torch's functional AdamW, in place."""
        # It takes one step tensor per parameter and increments it; the group's own count is incremented by the caller.
        # unbind() gives each parameter a view of its own element.
        steps = torch.full((len(parameters),), float(group.get("step", 0)), device=parameters[0].device)
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            exp_avgs,
            exp_avg_sqs,
            [],  # max_exp_avg_sqs, for amsgrad only
            list(steps.unbind()),
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def install() -> None:
    """Make megatron-core use this Adam if it found neither TransformerEngine's nor Apex's."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = Adam, False
        distrib_optimizer.Adam = Adam
        # Selects the code that saves and restores one step count per parameter group, as for the fused optimizers.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True


def adam_in_use() -> str:
    """Return the name of the Adam that megatron-core's optimizers use, for the log.

    Raises:
        RuntimeError: it is torch.optim.AdamW, whose state could not be restored when the run is resumed.
    """
    import megatron.core.optimizer as optimizers

    if optimizers.USING_PYTORCH_OPTIMIZER:
        raise RuntimeError(
            "megatron-core would use torch.optim.AdamW, which it cannot resume; call megatron_vcr1.model.cpu.install() "
            "once at start-up"
        )
    module = optimizers.Adam.__module__
    return "torch's fused AdamW" if module == __name__ else f"{module}.{optimizers.Adam.__name__}"
