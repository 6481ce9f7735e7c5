"""A step's output is whole or absent, and is made once."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from ctxprune.errors import UserError
from pipelines import store


def write(text: str):
    def make(folder: Path) -> None:
        (folder / "out.txt").write_text(text)

    return make


def test_a_finished_step_is_not_made_again(tmp_path):
    first = store.ensure(tmp_path, "step", {"a": 1}, write("one"))
    again = store.ensure(tmp_path, "step", {"a": 1}, write("two"))
    assert first == again and (first / "out.txt").read_text() == "one"


def test_other_inputs_make_another_step(tmp_path):
    first = store.ensure(tmp_path, "step", {"a": 1}, write("one"))
    assert store.ensure(tmp_path, "step", {"a": 2}, write("two")) != first


def test_a_step_that_fails_leaves_nothing_that_looks_finished(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "out.txt").write_text("half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        store.ensure(tmp_path, "step", {"a": 1}, fail)
    assert not store.finished(store.folder_of(tmp_path, "step", {"a": 1}))
    made = store.ensure(tmp_path, "step", {"a": 1}, write("whole"))
    assert (made / "out.txt").read_text() == "whole"


def test_leftovers_of_a_killed_run_never_reach_the_output(tmp_path):
    staged = store.staging_of(store.folder_of(tmp_path, "step", {"a": 1}))
    staged.mkdir(parents=True)
    (staged / "stale.txt").write_text("from a run that died")
    made = store.ensure(tmp_path, "step", {"a": 1}, write("whole"))
    assert sorted(p.name for p in made.iterdir()) == ["inputs.json", "manifest.json", "out.txt"]


def test_what_went_in_is_kept_beside_what_came_out(tmp_path):
    made = store.ensure(tmp_path, "step", {"a": [1, 2]}, write("x"))
    assert json.loads((made / store.INPUTS).read_text()) == {"a": [1, 2]}


def test_a_changed_byte_is_found_and_named(tmp_path):
    made = store.ensure(tmp_path, "step", {"a": 1}, write("whole"))
    store.check(made)
    (made / "out.txt").write_text("whole"[::-1])
    with pytest.raises(UserError, match=r"out\.txt"):
        store.check(made)


def _hold(path: str, ready, release) -> None:
    with store.locked(Path(path)):
        ready.set()
        release.wait(20)


def test_two_processes_never_make_the_same_step_at_once(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(str(tmp_path / "step"), ready, release))
    holder.start()
    assert ready.wait(20)
    with pytest.raises(UserError, match="another process"), store.locked(tmp_path / "step"):
        pass
    # The kernel frees the lock of a process that dies without a word.
    holder.kill()
    holder.join()
    with store.locked(tmp_path / "step"):
        pass


def test_a_reader_never_sees_half_a_json_file(tmp_path):
    path = tmp_path / "a.json"
    store.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        store.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}
