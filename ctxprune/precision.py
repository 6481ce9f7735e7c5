"""Are numbers fine enough? In 16 bits what is ranked ties, sums of many small numbers stop, and a step is lost that is
less than half of a number's last bit."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ctxprune.errors import UserError


def exact(dtype: torch.dtype) -> torch.dtype:
    """What scores and sums of numbers of this type are computed in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def exactly(numbers: Tensor) -> Tensor:
    """The numbers, in a type in which they can be compared and summed."""
    return numbers.to(exact(numbers.dtype))


def refuse_coarse(parameters: Iterable[Tensor]) -> None:
    """UserError for parameters of fewer than 32 bits."""
    for parameter in parameters:
        if torch.finfo(parameter.dtype).bits < 32:
            name = str(parameter.dtype).removeprefix("torch.")
            raise UserError(
                f"what is to be taught is in {name}, too coarse for its steps: teach model.float(), then cast"
            )
