"""Does the CPU's decoding kernel do what the torch path does, whatever it cannot be asked, and is it never missed?"""

from __future__ import annotations

import dataclasses
import logging
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from ctxprune import kernels
from ctxprune.kernels import agreement, checks
from ctxprune.kernels.decode import native_path
from ctxprune.kernels.decode.pages import NEVER, Pages, Slots
from tests.ctxprune.kernels.test_agreement import recorded, wrong
from tests.ctxprune.kernels.test_decode_attention import ABSENT, decoded, largest_error, pool, problem

pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"native: {ABSENT}")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def asked_anew():
    agreement._asked.cache_clear()
    yield
    agreement._asked.cache_clear()


@pytest.fixture
def not_built(monkeypatch, tmp_path):
    """As in a process that has not used it yet, with nothing kept from builds before."""
    monkeypatch.setattr(native_path, "_built", None)
    monkeypatch.setattr(native_path, "_failure", "")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return tmp_path


def fields(pages: Pages) -> list[torch.Tensor]:
    return [getattr(pages, field.name) for field in dataclasses.fields(Pages)[:-2]]  # without the hints


# What it computes.
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("page", "width", "rank", "heads"), [(16, 8, 4, (4, 2)), (32, 64, 7, (6, 2)), (16, 128, 1, (3, 1))]
)
def test_every_field_is_left_as_the_torch_path_leaves_it(page, width, rank, heads, dtype, n=70):
    """Widths with a loop of their own and without, several chunks of a row, all of it in place."""
    tensors = problem(heads=heads[0], kv_heads=heads[1], n=n, width=width, rank=rank, dtype=dtype)
    column = torch.arange(n)
    guard, times = (column + 9).expand(2, n), (column + 1 + (13 * column) % 61).expand(2, n)
    one, other = (pool(tensors, page=page, most=5) for _ in range(2))
    plain, _ = decoded(tensors, one, "torch", guard=guard, drop_time=times)
    found, _ = decoded(tensors, other, "native", guard=guard, drop_time=times)
    assert found.dtype == dtype and largest_error(found, plain.double()) <= (1e-12 if dtype == torch.float64 else 2e-5)
    assert all(torch.equal(*pair) for pair in zip(fields(one), fields(other), strict=True))
    assert one.drop_time.unique().numel() > 5, "something was dropped"


def test_long_rows_are_cut_and_put_together(n=700):
    tensors = problem(rows=1, n=n, width=4)
    tensors[5] += 100  # nothing drops
    pages = pool(tensors, page=128, most=6)
    step = torch.arange(n - 1, dtype=torch.int32)[None]
    before = [t[:, :, : n - 1] for t in tensors[1:3]] + [tensors[4][:, : n - 1]]
    pages.store(*before, step, step + 1, torch.full_like(step, NEVER))
    found = kernels.decode_attention(
        *(t[:, :, n - 1] for t in tensors[:3]), *(t[:, n - 1] for t in tensors[3:5]), tensors[5],
        torch.tensor([n - 1]), pages, scale=0.3, impl="native",
    )  # fmt: skip
    query, key, value = tensors[0][:, :, -1:], *(t.repeat_interleave(2, 1) for t in tensors[1:3])
    exact = torch.softmax(query @ key.transpose(2, 3) * 0.3, -1) @ value
    assert largest_error(found, exact[:, :, 0]) <= 1e-13


def test_neither_threads_nor_other_rows_change_a_bit(n=600):
    tensors = problem(rows=3, n=n, width=64, dtype=torch.float32)
    tensors[5] += 100

    def run(threads: int, rows: slice) -> torch.Tensor:
        mine = [t if t.ndim == 0 else t[rows] for t in tensors]
        pages = pool(mine, page=64, most=10)
        torch.set_num_threads(threads)
        return decoded(mine, pages, "native", guard=torch.full((len(mine[0]), n), NEVER))[0]

    before = torch.get_num_threads()
    try:
        wanted = run(1, slice(0, 3))
        assert torch.equal(run(4, slice(0, 3)), wanted) and torch.equal(run(3, slice(1, 2)), wanted[1:2])
    finally:
        torch.set_num_threads(before)


def poisoned(impl: str, dropped: bool) -> torch.Tensor:
    """A last step's output when all that is dead (dropped) or one that lives holds NaN."""
    tensors, column = problem(dtype=torch.float32), torch.arange(24)
    tensors[5] += 100  # gates drop nothing
    pages = pool(tensors)
    decoded(tensors, pages, impl, drop_time=torch.where(column < 10, 19, NEVER).expand(2, 24), steps=20)
    dead = (pages.drop_time <= 19) & (pages.position >= 0)
    page, place = (dead if dropped else pages.drop_time > 19).nonzero(as_tuple=True)
    assert len(page) >= 4
    pages.keys[page, :, place], pages.values[page, :, place] = torch.nan, torch.nan
    pages.interaction[page, place] = torch.nan
    query, key, value = (t[:, :, 20] for t in tensors[:3])
    return kernels.decode_attention(
        query, key, value, tensors[3][:, 20], tensors[4][:, 20], tensors[5], torch.full((2,), 20), pages, impl=impl
    )


def test_dead_slots_are_never_read():
    assert poisoned("native", dropped=True).isfinite().all()


def test_twin_slots_that_are_read_and_a_path_that_reads_all_are_noticed():
    assert not poisoned("native", dropped=False).isfinite().all()
    assert not poisoned("torch", dropped=True).isfinite().all()


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_a_slot_that_was_chosen_beforehand_is_taken(impl):
    """`used` and `free` stay as they are, and the choice holds for one step."""
    tensors = problem(n=6)
    pages, plain = pool(tensors), pool(tensors)
    for k in range(6):
        page = pages.table[:, 1].long() if k % 2 else pages.table[:, 0].long()
        pages.next = Slots(torch.stack([page, page], 1)[:, 0], torch.tensor([3 + k, 9 - k]))  # strided, as plans are
        token = [t[:, :, k] for t in tensors[:3]] + [t[:, k] for t in tensors[3:5]] + [tensors[5]]
        found = kernels.decode_attention(*token, torch.full((2,), k), pages, impl=impl)
        assert pages.next is None
        assert pages.position[page, torch.tensor([3 + k, 9 - k])].tolist() == [k, k]
        wanted = kernels.decode_attention(*token, torch.full((2,), k), plain, impl="reference")
        assert largest_error(found, wanted) <= 1e-12
    assert pages.used.tolist() == [0, 0] and pages.free.tolist() == [-1, -1]


def test_a_slot_outside_its_row_is_an_error_and_a_refusal_keeps_the_choice():
    tensors = problem(n=1)
    token = [t[:, :, 0] for t in tensors[:3]] + [t[:, 0] for t in tensors[3:5]] + [tensors[5]]
    pages = pool(tensors)
    theirs = pages.table.flip(0)[:, 0].long()
    pages.next = Slots(theirs, torch.zeros(2, dtype=torch.long))
    with pytest.raises(IndexError, match=r"pages\.next: not a slot of row 0"):
        kernels.decode_attention(*token, torch.zeros(2, dtype=torch.long), pages, impl="native")
    pages.next = hint = Slots(pages.table[:, 0].long(), torch.zeros(2, dtype=torch.long))
    with pytest.raises(checks.Refused, match="throughout"):
        kernels.decode_attention(token[0].float(), *token[1:], torch.zeros(2, dtype=torch.long), pages, impl="native")
    assert pages.next is hint and (pages.position < 0).all()


def test_infinities_and_nan_mean_what_they_mean_elsewhere():
    tensors = problem(n=4, dtype=torch.float32)
    tensors[5] += 100
    tensors[0][0, 0, 3] = torch.nan
    tensors[1][1, 0, 1] = -torch.inf  # its logit is -inf, inf or NaN: the same everywhere
    tensors[0][1] = tensors[0][1].abs()
    found, plain = (decoded(tensors, pool(tensors), impl)[0] for impl in ("native", "torch"))
    assert found[0, 0, 3].isnan().all() and found[1].isfinite().all()
    torch.testing.assert_close(found, plain, equal_nan=True, rtol=1e-5, atol=1e-6)


# When it is taken.
def step_of(dtype=torch.float32, **more) -> torch.Tensor:
    tensors = problem(n=1, dtype=dtype)
    return decoded(tensors, pool(tensors), "auto", **more)[0]


def test_auto_takes_it_once_it_has_agreed(monkeypatch):
    native, plain = (recorded(monkeypatch, "decode_attention", impl) for impl in ("native", "torch"))
    step_of()
    step_of()
    own = (2, 4, 8)
    assert native.count(own) == 2 and plain.count(own) == 0 and len(native) == 20 + 2


def test_what_is_wrong_is_not_used_and_said_once(monkeypatch, caplog):
    native = recorded(monkeypatch, "decode_attention", "native", wrong)
    for _ in range(2):
        step_of()
    assert (2, 4, 8) not in native and len(native) == 20
    (record,) = caplog.records
    assert "torch is used on cpu, not the CPU kernel (result 0 is off by" in record.getMessage()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_go_to_torch_without_a_word(dtype, monkeypatch, caplog):
    native, plain = (recorded(monkeypatch, "decode_attention", impl) for impl in ("native", "torch"))
    assert step_of(dtype).dtype == dtype
    assert native == [] and plain == [(2, 4, 8)] and not caplog.records
    with pytest.raises(checks.Refused, match="takes float32 and float64"):
        decoded(tensors := problem(n=1, dtype=dtype), pool(tensors), "native")


def test_gradients_go_to_torch(monkeypatch):
    plain = recorded(monkeypatch, "decode_attention", "torch")
    tensors = problem(n=1, dtype=torch.float32)
    tensors[0].requires_grad_()
    output = decoded(tensors, pool(tensors, most=1), "auto")[0]
    assert (2, 4, 8) in plain and torch.autograd.grad(output.sum(), tensors[0])[0].shape == tensors[0].shape
    with torch.no_grad():
        decoded(tensors, pool(tensors), "native")


def test_it_can_be_switched_off_and_on_again(monkeypatch, caplog):
    native, plain = (recorded(monkeypatch, "decode_attention", impl) for impl in ("native", "torch"))
    monkeypatch.setenv(native_path.SWITCH, "0")
    step_of()
    assert native == [] and plain == [(2, 4, 8)] and not caplog.records
    with pytest.raises(checks.Refused, match="switched off"):
        decoded(tensors := problem(n=1), pool(tensors), "native")
    rows = [row for row in kernels.describe() if row["implementation"] == "native"]
    assert [row["operation"] for row in rows] == ["decode_attention", "extend_attention"]
    assert all(not row["available"] and "CTXPRUNE_NATIVE=0" in row["reason"] for row in rows)
    monkeypatch.delenv(native_path.SWITCH)
    step_of()
    assert (2, 4, 8) in native


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch.compile's own look at it
def test_torch_compile_leaves_it_alone(monkeypatch):
    native = recorded(monkeypatch, "decode_attention", "native")
    tensors = problem(n=1, dtype=torch.float32)
    token = [t[:, :, 0] for t in tensors[:3]] + [t[:, 0] for t in tensors[3:5]] + [tensors[5]]
    pages, plain = pool(tensors), pool(tensors)
    compiled = torch.compile(lambda *t: kernels.decode_attention(*t) + 1.0, backend="eager")
    found = compiled(*token, torch.zeros(2, dtype=torch.long), pages)
    wanted = kernels.decode_attention(*token, torch.zeros(2, dtype=torch.long), plain, impl="torch")
    torch.testing.assert_close(found, wanted + 1.0)
    assert native[-1] == (2, 4, 8) and pages.used.tolist() == [1, 1]


# How it is built.
@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("CXX", "no-such-compiler", "no C++ compiler"), ("CXX", "false", "cannot be built")],
)
def test_what_cannot_be_built_is_torch_with_one_warning(name, content, reason, not_built, monkeypatch, caplog):
    monkeypatch.setenv(name, content)
    plain = recorded(monkeypatch, "decode_attention", "torch")
    for _ in range(2):
        assert step_of().isfinite().all()
    assert plain.count((2, 4, 8)) == 2
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert reason in record.getMessage() and "\n" not in record.getMessage()
    monkeypatch.undo()
    assert not list(not_built.rglob("lock"))


def test_a_failure_is_remembered(not_built, monkeypatch):
    build = Mock(side_effect=OSError("no space left"))
    monkeypatch.setattr(native_path, "_build", build)
    for _ in range(2):
        with pytest.raises(checks.Refused, match="cannot be built: no space left"):
            native_path.kernel()
    assert build.call_count == 1 and "no space left" in native_path.available()


def test_a_fault_of_our_own_is_not_taken_for_a_missing_compiler(not_built, monkeypatch):
    monkeypatch.setattr(native_path, "_build", lambda library: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        native_path.kernel()


def test_asking_builds_nothing(not_built):
    assert native_path.available() == "" and list(not_built.iterdir()) == []


def test_what_is_kept_is_loaded_without_a_compiler(not_built, monkeypatch):
    monkeypatch.undo()
    kept = native_path.kernel() and native_path._library()
    assert kept.is_file()
    script = "from ctxprune.kernels.decode import native_path as n; print(n.available() + '.', n.kernel().__name__)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT,
        env=os.environ | {"CXX": "no-such-compiler", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stdout.split() == [".", native_path.NAME]


def test_another_process_that_builds_is_waited_for_and_a_dead_one_is_not(tmp_path, monkeypatch):
    import fcntl

    path = tmp_path / "x.building"
    path.touch()  # left over: no process holds it
    with native_path._alone(path):
        pass
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(native_path, "PATIENCE", 0.3)
        before = time.monotonic()
        with native_path._alone(path):
            assert time.monotonic() - before >= 0.3
