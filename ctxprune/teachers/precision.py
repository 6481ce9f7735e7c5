"""Are numbers fine enough to be taught? In 16 bits a step is lost where it is less than half of a number's last bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ctxprune.errors import UserError


def refuse_coarse(parameters: Iterable[Tensor]) -> None:
    """UserError for parameters of fewer than 32 bits."""
    for parameter in parameters:
        if torch.finfo(parameter.dtype).bits < 32:
            name = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"what is to be taught is in {name}, too coarse for its steps: teach model.float(), then cast"
            )
