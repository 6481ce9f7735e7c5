"""What does one call of the training kernels look like? Its numbers, its passes over the rows, its lists of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from kernels.sigmoid.triton_path import interpreted
from kernels.soft_attention.triton_tiles import CONSTANT, MIXED


@dataclass(frozen=True)
class Shape:
    """What every launch needs to know of one call."""

    batch: int
    heads: int
    groups: int  # query heads per key/value head
    n: int
    width: int
    rank: int
    rows: int  # queries per tile
    keys: int  # keys per tile
    half: bool  # log I of a tile is kept in float16
    exact: bool  # some input is float32: no reduced-precision products
    upcast: bool  # the interpreter multiplies bit patterns of bfloat16

    @staticmethod
    def of(query: Tensor, key: Tensor, interaction: Tensor, rows: int, keys: int) -> Shape:
        batch, heads, n, width = query.shape
        dtypes = (query.dtype, interaction.dtype)
        return Shape(
            batch, heads, heads // key.shape[1], n, width, interaction.shape[-1], rows, keys,
            half=query.dtype != torch.float32,
            exact=torch.float32 in dtypes or torch.version.hip is not None,
            upcast=interpreted() and torch.bfloat16 in dtypes,
        )  # fmt: skip

    @property
    def row_blocks(self) -> int:
        return triton.cdiv(self.n, self.rows)

    @property
    def key_blocks(self) -> int:
        return triton.cdiv(self.n, self.keys)

    @property
    def padded(self) -> int:
        """Keys, to the end of the last tile."""
        return self.key_blocks * self.keys

    @property
    def bytes_per_pair(self) -> int:
        return 2 if self.half else 4

    def passes(self, workspace: int, bytes_per_pair: int) -> list[tuple[int, int]]:
        """(first row block, row blocks) of each pass, such that its tiles take at most `workspace` bytes."""
        block_bytes = self.batch * self.rows * self.padded * bytes_per_pair
        blocks = min(self.row_blocks, max(1, workspace // block_bytes))
        return [(first, min(blocks, self.row_blocks - first)) for first in range(0, self.row_blocks, blocks)]

    def attention(self) -> dict[str, object]:
        """Compile-time constants of the kernels that read queries, keys and values."""
        return {"WIDTH": self.width, "PADDED": _padded(self.width), **self._common()}

    def gates(self) -> dict[str, object]:
        """Compile-time constants of the kernels that read interaction queries and keys."""
        return {"RANK": self.rank, "PADDED_RANK": _padded(self.rank), **self._common()}

    def _common(self) -> dict[str, object]:
        precision = "ieee" if self.exact else "tf32"
        return {"ROWS": self.rows, "KEYS": self.keys, "PRECISION": precision, "UPCAST": self.upcast}


def _padded(width: int) -> int:
    """Columns of a tile: a power of two, of which tensor cores want at least 16."""
    return max(16, triton.next_power_of_2(width))


def tile_lists(tile_class: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Places along the last axis, MIXED tiles first, then CONSTANT, then DEAD, and how many of the first two."""
    tile_class = tile_class.contiguous()  # argsort keeps the strides of what it sorts
    order = torch.argsort(tile_class, dim=-1, descending=True, stable=True).to(torch.int32)
    mixed = (tile_class == MIXED.value).sum(-1, dtype=torch.int32)
    constant = (tile_class == CONSTANT.value).sum(-1, dtype=torch.int32)
    return order, mixed, constant


def strides_of(*tensors: Tensor) -> list[int]:
    return [stride for tensor in tensors for stride in tensor.stride()[:-1]]


def new_tiles(shape: Shape, blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A workspace of tiles, not initialised: what is read is what was written."""
    return torch.empty(shape.batch, blocks, shape.key_blocks, shape.rows, shape.keys, dtype=dtype, device=device)


def generation(device: torch.device) -> str:
    """Whose launch parameters a device takes: a family of kernels.ahead_of_time."""
    if torch.version.hip is not None:
        return "cdna"
    newer = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
    return "hopper" if newer else "ampere"
