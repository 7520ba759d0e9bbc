"""Adam for megatron-core's optimizers where neither TransformerEngine nor Apex brings one.

megatron-core then falls back to torch.optim.AdamW, which counts steps for each parameter. Its distributed optimizer
saves and restores the count of a parameter group only, as the fused ones keep it, so that such a run could not resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class Adam(torch.optim.Optimizer):
    """torch's fused AdamW, with the step counted in the parameter group."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
    ) -> None:
        """Raises ValueError for anything but decoupled weight decay."""
        if not adam_w_mode:
            raise ValueError("only decoupled weight decay (AdamW) is built")
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            learning = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not learning:
                continue
            for parameter in learning:
                if not self.state[parameter]:
                    self.state[parameter] = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            beta1, beta2 = group["betas"]
            adamw(
                learning,
                [parameter.grad for parameter in learning],
                [self.state[parameter]["exp_avg"] for parameter in learning],
                [self.state[parameter]["exp_avg_sq"] for parameter in learning],
                [],
                list(torch.full((len(learning),), float(group.get("step", 0)), device=learning[0].device).unbind()),
                fused=True,
                amsgrad=False,
                beta1=beta1,
                beta2=beta2,
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            group["step"] = group.get("step", 0) + 1


def install() -> str:
    """Give megatron-core this Adam if it has none of TransformerEngine or Apex; returns the name of what it uses."""
    import megatron.core.optimizer as optimizers
    from megatron.core.optimizer import distrib_optimizer

    if not distrib_optimizer.HAVE_APEX_OR_TE:
        optimizers.Adam, optimizers.USING_PYTORCH_OPTIMIZER = Adam, False
        distrib_optimizer.Adam = Adam
        # The fused ones' way to save and restore: a step a parameter group.
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    module = optimizers.Adam.__module__
    return "torch's fused AdamW" if module == __name__ else f"{module}.{optimizers.Adam.__name__}"
