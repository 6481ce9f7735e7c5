"""What does one call of the training kernels look like? Its numbers, its passes over the rows, its lists of tiles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ctxprune.kernels.checks import Refused
from ctxprune.kernels.sigmoid.triton_path import interpreted, precision
from ctxprune.kernels.soft_attention.triton_tiles import CONSTANT, MIXED

TILE = (64, 64)
"""Queries and keys per tile in half precision: what fits the registers of every generation from sm_80 on."""

FULL_TILE = (32, 32)
"""The same where some input is float32: its products take three times the registers."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Triton's names."""

WIDTHS = (32, 64, 80, 96, 128)
RANKS = (16, 32, 64, 128)
"""Widths of heads and of interactions that are compiled ahead of time; others are padded to the next of them."""


WIDEST_FULL = 64
"""Rank of float32 interactions at most: wider ones spill."""

GATES = tuple(
    (rank, dtype)
    for dtype in (torch.bfloat16, torch.float32)
    for rank in RANKS
    if dtype != torch.float32 or rank <= WIDEST_FULL
)
"""Interactions that whole rows are computed of."""


def check_rank(interaction: Tensor) -> None:
    """Raises Refused for interactions that would spill."""
    rank = interaction.shape[-1]
    most = WIDEST_FULL if interaction.dtype == torch.float32 else RANKS[-1]
    if rank > most:
        kind = str(interaction.dtype).removeprefix("torch.")
        raise Refused(
            f"interaction_query is {kind} of rank {rank}; Triton takes 1 to {most} in {kind}: take impl='torch'"
        )


def check_addresses(*tensors: Tensor) -> None:
    """Raises Refused for matrices whose rows lie so far from each other that 32 bits do not count the numbers."""
    for tensor in tensors:
        if tensor.shape[-2] * abs(tensor.stride(-2)) >= 1 << 31:
            raise Refused(f"rows of {tuple(tensor.shape)}, {tensor.stride(-2)} apart: too long for Triton's addresses")


@dataclass(frozen=True)
class Variant:
    """What is compiled ahead of time. width: of heads, or rank of interactions; beside_gates: with gates in float32."""

    width: int
    dtype: torch.dtype
    beside_gates: bool = False

    @property
    def tile(self) -> tuple[int, int]:
        return FULL_TILE if self.beside_gates or self.dtype == torch.float32 else TILE

    @property
    def name(self) -> str:
        return f"width={self.width} {DTYPES[self.dtype]}{' gates fp32' if self.beside_gates else ''}"

    @property
    def usual(self) -> bool:
        """Whether every run of the tests compiles it, and not only whoever changes a kernel."""
        full = self.dtype == torch.float32
        return not self.beside_gates and (not full or self.width in (64, 128))


SHAPES = (
    *(Variant(width, dtype) for dtype in (torch.bfloat16, torch.float32) for width in WIDTHS),
    Variant(64, torch.float16),
)
"""Attention; float16 differs from bfloat16 in one instruction."""

TRAINED = (*SHAPES, *(Variant(width, torch.bfloat16, beside_gates=True) for width in WIDTHS))
"""The same where gates are computed too."""


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
    dtype: torch.dtype  # of queries, keys and values
    gate_dtype: torch.dtype  # of interaction queries and keys
    upcast: bool  # the interpreter multiplies bit patterns of bfloat16

    @staticmethod
    def of(query: Tensor, key: Tensor, interaction: Tensor, rows: int, keys: int) -> Shape:
        batch, heads, n, width = query.shape
        return Shape(
            batch, heads, heads // key.shape[1], n, width, interaction.shape[-1], rows, keys, query.dtype,
            interaction.dtype, upcast=interpreted() and torch.bfloat16 in (query.dtype, interaction.dtype),
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
    def bias_dtype(self) -> torch.dtype:
        """What log I of a tile is kept in."""
        return torch.float32 if self.dtype == torch.float32 else torch.float16

    def passes(self, start: int, blocks: int, workspace: int, bytes_per_pair: int) -> list[tuple[int, int]]:
        """(first row block, row blocks) of each pass over `blocks` row blocks from `start` on, such that its tiles take
        at most `workspace` bytes."""
        step = max(1, workspace // (self.batch * self.rows * self.padded * bytes_per_pair))
        return [(first, min(step, start + blocks - first)) for first in range(start, start + blocks, step)]

    def attention(self) -> dict[str, object]:
        """Compile-time constants of the kernels that read queries, keys and values."""
        return attention_constants(self.width, self.dtype, (self.rows, self.keys)) | {"UPCAST": self.upcast}

    def gates(self) -> dict[str, object]:
        """Compile-time constants of the kernels that read interaction queries and keys."""
        return gate_constants(self.rank, self.gate_dtype, (self.rows, self.keys)) | {"UPCAST": self.upcast}


def default_tile(*dtypes: torch.dtype) -> tuple[int, int]:
    """Queries and keys per tile, for inputs of these types."""
    return FULL_TILE if torch.float32 in dtypes else TILE


def attention_constants(width: int, dtype: torch.dtype, tile: tuple[int, int]) -> dict[str, object]:
    return {"WIDTH": width, "PADDED": padded(width), **_tile_constants(dtype, tile)}


def gate_constants(rank: int, dtype: torch.dtype, tile: tuple[int, int]) -> dict[str, object]:
    return {"RANK": rank, "PADDED_RANK": padded(rank), **_tile_constants(dtype, tile)}


def _tile_constants(dtype: torch.dtype, tile: tuple[int, int]) -> dict[str, object]:
    return {"ROWS": tile[0], "KEYS": tile[1], "PRECISION": precision(dtype), "UPCAST": False}


def padded(width: int) -> int:
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
    # Data-centre GPUs alone have the shared memory of a Hopper: later ones of a desk (12.x) have an Ada's.
    newer = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)
    return "hopper" if newer else "ampere"
