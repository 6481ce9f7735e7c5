"""Who decides that a key is dropped? A later query, through one small interaction per layer."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ctxprune.kernels.decode.native_path import interactions

INITIAL_STD = 0.02
"""Standard deviation of the gates' initial weights (arXiv 2305.15805, appendix)."""


class InteractionGate(nn.Module):
    """Interaction query, key and offset of one layer: x[n, j] = q[n] . k[j] / sqrt(rank) + beta (arXiv 2305.15805, eq.
    4).

    width: hidden size of the layer's normalised input; rank: width r of the interaction.
    """

    def __init__(self, width: int, rank: int, beta: float):
        super().__init__()
        self.rank = rank
        self.query = nn.Linear(width, rank, bias=False)
        self.key = nn.Linear(width, rank, bias=False)
        # One element, not zero axes: DeepSpeed broadcasts parameters byte by byte and cannot view a scalar so.
        self.beta = nn.Parameter(torch.tensor([float(beta)]))
        nn.init.normal_(self.query.weight, std=INITIAL_STD)
        nn.init.normal_(self.key.weight, std=INITIAL_STD)

    def forward(
        self, hidden: Float[Tensor, "batch n width"]
    ) -> tuple[Float[Tensor, "batch n rank"], Float[Tensor, "batch n rank"], Float[Tensor, ""]]:
        """Interaction query, interaction key and beta, in the dtype of the gate's weights."""
        # Asked for as attributes, a module's parameters are found last: at every step, in every layer.
        layers: dict[str, Any] = self._modules
        own: dict[str, Any] = self._parameters
        query, key = (layers[name]._parameters.get("weight") for name in ("query", "key"))
        found = interactions(hidden, query, key, own["beta"])
        if found is None:  # also where ZeRO-3 keeps the weights elsewhere, and brings them when their layers are called
            # beta leaves as a computed tensor: ZeRO-3 frees the parameter itself as soon as this module returns.
            found = self.query(hidden), self.key(hidden), self.beta.sum()
        return found
