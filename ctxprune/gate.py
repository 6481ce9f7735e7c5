"""Who decides that a key is dropped? A later query, through one small interaction per layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

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
        # Not a module of its own: its weight is a copy, to be neither trained nor saved.
        self._joined: tuple[list, nn.Module] | None = None
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
        # beta leaves as a computed tensor: ZeRO-3 frees the parameter itself as soon as this module returns.
        beta = self.beta.sum()
        if not torch.is_inference_mode_enabled() or hidden.device.type != "cpu" or not self._whole():
            return self.query(hidden), self.key(hidden), beta
        query, key = self._both()(hidden).split(self.rank, dim=-1)
        return query, key, beta

    def _whole(self) -> bool:
        """Whether the weights are here (ZeRO-3 keeps them elsewhere between calls) and know when they were changed."""
        weights = (self.query.weight, self.key.weight)
        return all(len(weight) == self.rank and not weight.is_inference() for weight in weights)

    def _both(self) -> nn.Module:
        """One layer for query and key: on a CPU a step of few tokens costs as much per layer as per product."""
        weights = (self.query.weight, self.key.weight)
        made_of = [(type(self.query), *((weight.data_ptr(), weight._version, weight.dtype) for weight in weights))]
        if self._joined is None or self._joined[0] != made_of:
            with torch.inference_mode(False), torch.no_grad():
                joined = nn.Linear(weights[0].shape[1], 2 * self.rank, bias=False, device="meta")
                joined.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
            # Packed as they are (ctxprune.pack).
            layer = joined if isinstance(self.query, nn.Linear) else type(self.query)(joined)
            self._joined = made_of, layer
        return self._joined[1]

    def train(self, mode: bool = True) -> InteractionGate:
        """As of every module. Optimizers may change weights behind the back of their version counters."""
        self._joined = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_joined": None}
