"""What is in a data set? Its rows, as the datasets library streams them from a hub or a local folder."""

from __future__ import annotations

from collections.abc import Iterator

from ctxprune.errors import UserError


def streamed(place: str, config: str | None = None, *, called: str) -> Iterator[dict]:
    """Rows of the train split, one at a time. UserError, of the name that it is `called` by, where it does not load."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise UserError(f"data set {called} needs the package datasets: pip install datasets") from error
    try:
        yield from load_dataset(place, config, split="train", streaming=True)
    except Exception as error:  # datasets, fsspec, the hub and every builder raise kinds of their own
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"data set {called} does not load: {cause[:300]}") from error
