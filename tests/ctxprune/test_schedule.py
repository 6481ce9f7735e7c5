"""Beside a loop of one's own: the penalty makes gates drop, the controller nears the target, settling meets it."""

from __future__ import annotations

import json
import multiprocessing

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, get_linear_schedule_with_warmup

import ctxprune
from ctxprune import PruningSchedule, UserError, budget
from ctxprune.budget import measure
from ctxprune.drop_time import drop_times
from ctxprune.retrofitting import gate_parameters, state_of, wrappers
from ctxprune.visibility import visible_pairs

STEPS, LENGTH = 400, 48


def made() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return ctxprune.retrofit(AutoModelForCausalLM.from_config(config), ctxprune.GateConfig(rank=4)).train()


def rows(step: int) -> torch.Tensor:
    """Three tokens, again and again: some of the context is needed, most of it is not."""
    return torch.randint(32, (8, 3), generator=torch.Generator().manual_seed(step)).repeat(1, LENGTH // 3)


def dropped(model, ids: torch.Tensor) -> float:
    model.eval()
    taken = drop_times(model, ids)
    return 1.0 - taken.kept_pairs().sum().item() / len(taken.drop_time) / visible_pairs(taken.document_end).sum().item()


def trained(steps: int, penalised: bool = True, **asked) -> tuple[torch.nn.Module, PruningSchedule, list[dict]]:
    model, seen = made(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rate = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    schedule = PruningSchedule(model, steps, **asked)
    for step in range(steps):
        ids, alpha = rows(step), state_of(model).alpha
        loss = model(ids, labels=ids, use_cache=False).loss + penalised * schedule.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rate.step()
        schedule.step()
        seen.append({"alpha": alpha, "gamma": schedule.gamma, "hard": schedule.sparsity, "goal": schedule.goal})
        seen[-1]["loss"] = loss.item()
    return model, schedule, seen


def test_gates_learn_to_drop_what_is_asked_and_settle_on_it_exactly():
    model, schedule, seen = trained(STEPS, sparsity=0.5)
    held_out = rows(10_000)
    assert abs(dropped(model, held_out) - 0.5) < 0.1
    schedule.settle([held_out])
    assert dropped(model, held_out) == pytest.approx(0.5, abs=0.01)
    with torch.no_grad():
        assert model(held_out, labels=held_out, use_cache=False).loss < 1.2  # 3.5 without learning
    assert [one["hard"] is not None for one in seen] == [not step % 4 or step == STEPS - 1 for step in range(STEPS)]
    assert seen[-1]["goal"] == pytest.approx(0.5) and seen[0]["alpha"] == pytest.approx(1.001)
    assert state_of(model).alpha == pytest.approx(8.0) and state_of(model).record is None


def test_without_the_penalty_they_keep_what_they_kept():
    model, _, _ = trained(100, penalised=False, sparsity=0.5)
    assert dropped(model, rows(10_000)) < 0.1


def test_a_weight_of_ones_own_stays_and_nothing_moves_after_the_last_step():
    model, schedule, seen = trained(12, gamma=0.05)
    assert {one["gamma"] for one in seen} == {0.05} and schedule.goal is None
    schedule.step()
    assert (schedule.done, state_of(model).alpha) == (12, seen[-1]["alpha"])
    with pytest.raises(UserError, match="give it one"):
        schedule.settle([rows(0)])


def test_what_is_read_between_penalty_and_step_is_not_measured():
    """A teacher's dense pass, or a validation, on the same model."""
    measured = []
    for disturb in (False, True):
        model = made()
        for wrapper in wrappers(model):
            wrapper.rule.gate.beta.data.fill_(0.0)
        schedule = PruningSchedule(model, 8, sparsity=0.5, alpha_start=6.0)
        for step in range(5):
            model(rows(step), use_cache=False)
            schedule.penalty()
            if disturb:
                drop_times(model, rows(99)[:2])
                with torch.no_grad(), ctxprune.mode(model, "dense"):
                    model(rows(99), use_cache=False)
            schedule.step()
            if disturb:
                drop_times(model, rows(98)[:2])
            measured.append((schedule.sparsity, schedule.sparsity_soft, schedule.gamma))
    assert measured[:5] == measured[5:] and 0 < measured[4][0] < 1


def test_a_training_that_is_resumed_goes_on_where_it_stood():
    def run(schedule, first: int, last: int) -> list:
        seen = []
        for step in range(first, last):
            schedule.model(rows(step), use_cache=False)
            schedule.penalty()
            schedule.step()
            seen.append((schedule.gamma, schedule.goal, schedule.sparsity_soft, state_of(schedule.model).alpha))
        return seen

    whole = run(PruningSchedule(made(), 20, sparsity=0.5), 0, 20)
    half = PruningSchedule(made(), 20, sparsity=0.5)
    run(half, 0, 10)
    resumed = PruningSchedule(made(), 20, sparsity=0.5)
    resumed.load_state_dict(json.loads(json.dumps(half.state_dict())))
    assert run(resumed, 10, 20) == whole[10:]
    assert run(PruningSchedule(made(), 20, sparsity=0.5), 10, 20) != whole[10:]


def test_a_training_that_was_over_is_still_over_when_it_is_resumed():
    _, schedule, seen = trained(6, sparsity=0.5)
    again = PruningSchedule(made(), 6, sparsity=0.5)
    again.load_state_dict(schedule.state_dict())
    for one in (schedule, again):
        assert (one.done, state_of(one.model).alpha, state_of(one.model).record) == (6, seen[-1]["alpha"], None)


def _rank(rank: int, store: str, found, hopeless: bool) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = made()
    given = rows(rank)[:, :1] if hopeless and rank == 1 else rows(rank)
    shift = PruningSchedule(model, 2, sparsity=0.3).settle([given])
    found.put((rank, shift, [wrapper.rule.gate.beta.item() for wrapper in wrappers(model)]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("hopeless", [False, True])
def test_ranks_that_settle_on_other_rows_take_the_same_thresholds(tmp_path, hopeless):
    """Where no shift reaches the target on the other's rows too: nobody waits for it."""
    spawn = multiprocessing.get_context("spawn")
    found = spawn.Queue()
    ranks = [spawn.Process(target=_rank, args=(rank, str(tmp_path / "group"), found, hopeless)) for rank in range(2)]
    for one in ranks:
        one.start()
    (_, *first), (_, *second) = sorted(found.get(timeout=120) for _ in ranks)
    for one in ranks:
        one.join()
    assert first == second
    if not hopeless:
        alone = [PruningSchedule(made(), 2, sparsity=0.3).settle([rows(rank)]) for rank in range(2)]
        assert first[0] == pytest.approx(alone[0]) and alone[0] != alone[1], "rank 0's rows decide"


def test_the_penalty_is_gamma_times_what_was_kept():
    model = made()
    schedule = PruningSchedule(model, 10, gamma=2.0)
    model(rows(0), use_cache=False)
    kept = torch.stack(list(state_of(model).survival.values())).mean()
    assert schedule.penalty(3.0).item() == pytest.approx(6.0 * kept.item())


def test_gates_in_16_bits_are_said_to_be_too_coarse():
    model = made().bfloat16()
    with pytest.warns(UserWarning, match="gates in torch.bfloat16 do not move by small steps"):
        schedule = PruningSchedule(model, steps=4, sparsity=0.5)
    with pytest.raises(UserError, match="too coarse for its steps"):
        schedule.settle([rows(0)])


def test_an_interrupted_settling_leaves_the_thresholds_alone(monkeypatch):
    model, calls = made(), []
    before = [p.clone() for p in gate_parameters(model)]

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(budget, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        PruningSchedule(model, steps=4, sparsity=0.5).settle([rows(0)])
    assert all(torch.equal(one, other) for one, other in zip(before, gate_parameters(model), strict=True))


def test_mistakes_are_answered():
    model = made()
    for asked, said in (
        ({"steps": 0}, "at least 1"),
        ({"steps": 5}, "one of the two"),
        ({"steps": 5, "sparsity": 0.5, "gamma": 1.0}, "one of the two"),
        ({"steps": 5, "gamma": -1.0}, "0 or more"),
        ({"steps": 5, "gamma": float("nan")}, "0 or more"),
        ({"steps": 5, "gamma": 1.0, "alpha_start": 0.9}, "1 <= start"),
        ({"steps": 5, "gamma": 1.0, "alpha_end": 20.0}, "<= 16"),
        ({"steps": 5, "gamma": 1.0, "alpha_start": 9.0}, "1 <= start"),
        ({"steps": 5, "gamma": 1.0, "alpha_steps": 0.0}, r"\(0, 1\]"),
        ({"steps": 5, "sparsity": 1.0}, "between 0 and 1"),
        ({"steps": 5, "sparsity": float("nan")}, "between 0 and 1"),
    ):
        with pytest.raises(UserError, match=said):
            PruningSchedule(model, **asked)
    with pytest.raises(UserError, match="no gates"):
        PruningSchedule(ctxprune.retrofit(AutoModelForCausalLM.from_config(model.config), ctxprune.DenseConfig()), 5)
    schedule = PruningSchedule(model, 5, sparsity=0.5)
    with pytest.raises(UserError, match=r"model\.train"):
        schedule.penalty()
    model.eval()
    model(rows(0), use_cache=False)
    with pytest.raises(UserError, match=r"model\.train"):
        schedule.penalty()
    with pytest.raises(UserError, match="some batches"):
        schedule.settle([])
