"""Does decoding step by step see exactly what whole rows see, in slots that are taken again? Triton on a GPU, else
interpreted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctxprune import kernels
from ctxprune.kernels.checks import Refused
from ctxprune.kernels.decode import native_path, triton_path
from ctxprune.kernels.decode.pages import NEVER, Pages

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ABSENT = "it is for CPUs" if DEVICE.type == "cuda" else native_path.available()
NATIVE = pytest.param("native", marks=pytest.mark.skipif(bool(ABSENT), reason=f"native: {ABSENT}"))
IMPLEMENTATIONS = ("reference", "torch", NATIVE, "triton")
TOLERANCE = {"reference": 1e-12, "torch": 1e-12, "native": 1e-12, "triton": 3e-6}


def problem(rows=2, heads=4, kv_heads=2, n=24, width=8, rank=4, dtype=torch.float64, seed=0):
    """query, key, value and gates of whole rows. Gates of small integers: every implementation finds the same x."""
    generator = torch.Generator().manual_seed(seed)

    def normal(count):
        return torch.randn(rows, count, n, width, generator=generator, dtype=torch.float64).to(DEVICE, dtype)

    gates = [torch.randint(-2, 3, (rows, n, rank), generator=generator).to(DEVICE, dtype) for _ in range(2)]
    return [normal(heads), normal(kv_heads), normal(kv_heads), *gates, torch.tensor(1.5, dtype=dtype, device=DEVICE)]


def pool(tensors, page=16, most=2, seed=0, gated=True) -> Pages:
    """Pages in a random order in the table, a spare one among them."""
    rows, kv_heads, _, width = tensors[1].shape
    pages = Pages.empty(
        rows * most + 1, rows, most, kv_heads=kv_heads, width=width, rank=tensors[3].shape[-1] if gated else None,
        page=page, dtype=tensors[1].dtype, device=DEVICE,
    )  # fmt: skip
    order = torch.randperm(rows * most + 1, generator=torch.Generator().manual_seed(seed))
    pages.table.copy_(order[: rows * most].view(rows, most))
    return pages


def decoded(tensors, pages, impl, guard=None, drop_time=None, gated=True, steps=None):
    """Outputs (rows, heads, n, width) of decoding token by token, and how many keys lived after each step."""
    query, key, value, iq, ik, beta = tensors
    n, outputs, live = query.shape[2], [], []
    for k in range(n if steps is None else steps):
        step = torch.full((len(query),), k, device=DEVICE)
        more = {"guard": guard, "drop_time": drop_time}
        more = {name: t[:, k] for name, t in more.items() if t is not None}
        gates = (iq[:, k], ik[:, k], beta) if gated else (None, None, None)
        outputs.append(
            kernels.decode_attention(
                query[:, :, k], key[:, :, k], value[:, :, k], *gates, step, pages, scale=0.3, impl=impl, **more
            )
        )
        live.append(pages.live(step))
    return torch.stack(outputs, 2), torch.stack(live, 1)


def largest_error(found, exact) -> float:
    return (found.double() - exact).abs().max().nan_to_num(torch.inf).item()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 2), (4, 1)])
def test_token_by_token_is_whole_rows(heads, kv_heads, impl, n=24):
    """The same outputs as attention under offline drop times, the same number of keys alive at every step."""
    tensors = problem(heads=heads, kv_heads=kv_heads, n=n)
    column = torch.arange(n, device=DEVICE)
    guard = torch.where(column < 2, n, column + 3).expand(2, n)
    times = kernels.drop_times(*tensors[3:], guard=guard, impl="reference")
    exact = kernels.drop_time_attention(*tensors[:3], times, scale=0.3, impl="reference")
    if impl == "triton":
        tensors = [tensor.float() for tensor in tensors]
    guard = torch.where(column < 2, NEVER, column + 3).expand(2, n)
    found, live = decoded(tensors, pages := pool(tensors), impl, guard=guard)
    assert largest_error(found, exact) <= TOLERANCE[impl]
    alive = (column[None, :, None] >= column) & (column[None, :, None] < times[:, None, :])
    assert torch.equal(live, alive.sum(2))
    # A token goes where one died: slots in use never exceed the keys that lived at once, and one.
    assert (pages.used <= alive.sum(2).amax(1) + 1).all() and (pages.used < n).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_drop_times_of_other_rules_without_gates(impl, n=24):
    tensors = problem(n=n)
    column = torch.arange(n, device=DEVICE)
    times = torch.stack([column + 5, torch.where(column % 4 == 0, n, column + 1)])
    exact = kernels.drop_time_attention(*tensors[:3], times, scale=0.3, impl="reference")
    if impl == "triton":
        tensors = [tensor.float() for tensor in tensors]
    pages = pool(tensors, gated=False)
    found, _ = decoded(tensors, pages, impl, drop_time=times, gated=False)
    assert largest_error(found, exact) <= TOLERANCE[impl]
    assert pages.used[0].item() <= 6  # a window of five keys, and the one that arrives


@pytest.mark.parametrize(("splits", "width"), [(1, 8), (2, 20), (3, 8)])
def test_splits_of_the_pages_change_nothing(splits, width):
    tensors = problem(width=width, dtype=torch.float32, n=20)
    one, other = pool(tensors), pool(tensors)
    query, key, value, iq, ik, beta = tensors
    for k in range(20):
        step = torch.full((2,), k, dtype=torch.int32, device=DEVICE)
        now = (query[:, :, k], key[:, :, k], value[:, :, k], iq[:, k], ik[:, k], beta)
        exact = kernels.decode_attention(*now, step, one, scale=0.3, impl="reference")
        found = triton_path.decode_attention(
            *now, step, step + 1, torch.full_like(step, NEVER), other, 0.3, splits=splits
        )
        assert largest_error(found, exact) <= 2e-6
    for field in dataclasses.fields(Pages)[:-2]:  # without the hints
        assert torch.equal(getattr(one, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [
        *((impl, dtype) for impl in ("torch", "triton") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
        pytest.param("native", torch.float32, marks=NATIVE.marks),
    ],
)
def test_the_error_is_at_most_twice_the_plain_forms(impl, dtype):
    tensors = problem(dtype=dtype)
    times = kernels.drop_times(*tensors[3:], impl="reference")
    exact = kernels.drop_time_attention(*tensors[:3], times, scale=0.3, impl="reference")
    found, _ = decoded(tensors, pool(tensors), impl)
    assert found.dtype == dtype
    column = torch.arange(24, device=DEVICE)
    seen = ((column <= column[:, None]) & (column[:, None] < times[:, None, :]))[:, None]
    query, key, value = tensors[0], *(t.repeat_interleave(2, 1) for t in tensors[1:3])
    logits = (query @ key.transpose(2, 3) * 0.3).masked_fill(~seen, -torch.inf)
    allowed = 2 * largest_error(torch.softmax(logits, -1) @ value, exact) + 2 * torch.finfo(dtype).eps
    assert largest_error(found, exact) <= allowed


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_are_ragged_idle_and_independent(impl):
    """A row that idles now and then ends where it would have ended alone."""
    tensors = problem(rows=3, n=18, dtype=torch.float32)
    query, key, value, iq, ik, beta = tensors
    together, at = pool(tensors), [0, 0, 0]
    outputs = [[], [], []]
    for turn in range(20):
        step = torch.tensor([k if (turn + row) % (row + 2) and k < 18 else -1 for row, k in enumerate(at)])
        place = (torch.arange(3), step.clamp(min=0))
        found = kernels.decode_attention(
            query.transpose(1, 2)[place], key.transpose(1, 2)[place], value.transpose(1, 2)[place],
            iq[place], ik[place], beta, step.to(DEVICE), together, scale=0.3, impl=impl,
        )  # fmt: skip
        for row, k in enumerate(step.tolist()):
            if k >= 0:
                outputs[row].append(found[row])
                at[row] += 1
            else:
                assert found[row].abs().max() == 0
    for row in range(3):
        alone = [t if t.ndim == 0 else t[row : row + 1] for t in tensors]
        wanted, _ = decoded(alone, pool(alone, seed=row), impl)
        found = torch.stack(outputs[row], 1)
        assert at[row] > 7 and largest_error(found, wanted[0, :, : at[row]].double()) <= 1e-6


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_token_without_room_is_refused_loudly_and_hurts_nobody(impl):
    """The first row has one page of 16 slots and drops nothing; the second has two."""
    tensors = problem(n=20, dtype=torch.float32)
    tensors[5] = tensors[5] + 100.0
    pages, whole = pool(tensors), pool(tensors)
    pages.table[0, 1:] = -1
    found, _ = decoded(tensors, pages, impl)
    wanted, _ = decoded(tensors, whole, impl)
    assert torch.equal(found[:, :, :16], wanted[:, :, :16]) and torch.equal(found[1], wanted[1])
    assert found[0, :, 16:].isnan().all()
    assert pages.refused.tolist() == [4, 0] and pages.used.tolist() == [16, 20]


@pytest.mark.parametrize(
    ("impl", "poison"),
    [("torch", 1e30), pytest.param("native", float("nan"), marks=NATIVE.marks), ("triton", float("nan"))],
)
def test_slots_that_nobody_uses_are_not_seen(impl, poison):
    tensors = problem(dtype=torch.float32)
    clean, dirty = pool(tensors), pool(tensors)
    for buffer in (dirty.keys, dirty.values, dirty.interaction):
        buffer.fill_(poison)
    wanted, _ = decoded(tensors, clean, impl)
    found, _ = decoded(tensors, dirty, impl)
    assert torch.equal(found, wanted)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from([16, 32]), st.integers(-3, 3))
@pytest.mark.parametrize("impl", ["torch", NATIVE, "triton"])
def test_random_lives_against_a_dictionary(impl, seed, page, beta):
    """What is stored, what each row sees and what is dropped, against sets of positions."""
    generator = torch.Generator().manual_seed(seed)
    tensors = problem(rows=1, heads=1, kv_heads=1, n=30, width=1, seed=seed, dtype=torch.float32)
    tensors[0].zero_()  # every visible key weighs the same: the output is the mean of what is seen
    tensors[2].copy_(2.0 ** torch.randint(0, 6, (30,), generator=generator)[:, None])
    tensors[5] = torch.tensor(beta + 0.5, device=DEVICE)
    life = torch.randint(1, 30, (1, 30), generator=generator)
    column = torch.arange(30)
    guard, times = column + torch.randint(1, 20, (1, 30), generator=generator), column + life
    pages = pool(tensors, page=page)
    found, _ = decoded(tensors, pages, impl, guard=guard.to(DEVICE), drop_time=times.to(DEVICE))
    iq, ik, alive = tensors[3][0].cpu(), tensors[4][0].cpu(), set()
    for k in range(30):
        alive = {j for j in alive | {k} if k < times[0, j]}
        x = {j: (iq[k] @ ik[j]).item() / 2 + beta + 0.5 for j in alive}
        alive = {j for j in alive if x[j] > 0 or k < guard[0, j]}
        mean = sum(tensors[2][0, 0, j, 0].item() for j in alive) / len(alive)
        assert abs(found[0, 0, k, 0].item() - mean) <= 1e-4 * mean


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_step_is_captured_once_and_replayed():
    """Nothing in a step waits for the host."""
    tensors = problem(dtype=torch.float32)
    wanted, _ = decoded(tensors, pool(tensors), "triton")
    pages, graph = pool(tensors), torch.cuda.CUDAGraph()
    query, key, value, iq, ik, beta = tensors
    now = [t[:, :, 0].clone() for t in (query, key, value)] + [t[:, 0].clone() for t in (iq, ik)]
    step = torch.full((2,), -1, dtype=torch.int32, device=DEVICE)  # idle: compiles, changes nothing
    kernels.decode_attention(*now, beta, step, pages, scale=0.3, impl="triton")
    with torch.cuda.graph(graph):
        output = kernels.decode_attention(*now, beta, step, pages, scale=0.3, impl="triton")
    for k in range(query.shape[2]):
        for static, t in zip(now, (query[:, :, k], key[:, :, k], value[:, :, k], iq[:, k], ik[:, k]), strict=True):
            static.copy_(t)
        step.fill_(k)
        graph.replay()
        assert torch.equal(output, wanted[:, :, k])


class Launched(Exception):
    """Triton would take it from here."""


@pytest.mark.parametrize("page", [64, 128])
@pytest.mark.parametrize("width", [64, 72, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_triton_is_said_to_take_is_what_it_does_not_refuse(dtype, width, page, monkeypatch):
    def launched(*_):
        raise Launched

    monkeypatch.setattr(triton_path, "check_device", lambda query: None)
    monkeypatch.setattr(triton_path, "_splits", launched)
    tensors = problem(n=1, width=width, dtype=dtype)
    with pytest.raises(Launched if triton_path.takes(width, dtype, page) else Refused):
        decoded(tensors, pool(tensors, page=page), "triton")


def test_shapes_dtypes_and_missing_gates_are_refused_by_name():
    tensors = problem(dtype=torch.float32)
    pages, step = pool(tensors), torch.zeros(2, dtype=torch.int64, device=DEVICE)
    query, key, value = (t[:, :, 0] for t in tensors[:3])
    iq, ik, beta = tensors[3][:, 0], tensors[4][:, 0], tensors[5]
    good = {
        "query": query, "key": key, "value": value, "interaction_query": iq, "interaction_key": ik, "beta": beta,
        "step": step, "pages": pages,
    }  # fmt: skip
    changes = [
        ({"query": query[:1]}, "query has shape"),
        ({"query": query[:, :3]}, "not a multiple"),
        ({"key": key[:, :1]}, "key has shape"),
        ({"value": value.long()}, "value is int64; accepted values are float64"),
        ({"step": step.float()}, "step is float32; accepted values are int32, int64"),
        ({"step": step[:1]}, "step has shape"),
        ({"interaction_query": iq[:, :2]}, "interaction_query has shape"),
        ({"interaction_key": ik * torch.nan}, "interaction_key holds NaN"),
        ({"beta": None}, "want all three or none"),
        ({"interaction_query": None, "interaction_key": None, "beta": None}, "exactly where the pages hold"),
    ]
    for change, message in changes:
        if "NaN" in message and DEVICE.type == "cuda":
            continue
        with pytest.raises(ValueError, match=message):
            kernels.decode_attention(**{**good, **change})
    assert pages.used.tolist() == [0, 0]
    with pytest.raises(ValueError, match="page is 48"):
        Pages.empty(1, 1, 1, kv_heads=1, width=8, rank=None, page=48)
    wide = Pages.empty(2, 2, 1, kv_heads=1, width=130, rank=None)
    one = torch.zeros(2, 1, 130)
    with pytest.raises(ValueError, match=r"Triton takes 1 to 128|CUDA device"):
        kernels.decode_attention(one, one, one, None, None, None, step.cpu(), wide, impl="triton")
    large = Pages.empty(2, 2, 1, kv_heads=1, width=80, rank=None, page=128, device=DEVICE)
    one = torch.zeros(2, 1, 80, device=DEVICE)
    with pytest.raises(ValueError, match="pages of 128 slots: Triton takes 16, 32 and 64"):
        kernels.decode_attention(one, one, one, None, None, None, step, large, impl="triton")
