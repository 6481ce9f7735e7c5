"""Does a small model learn what it is for, and is it a plain transformers model all the same?"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import ctxprune
from ctxprune.errors import UserError
from ctxprune.tasks import SYNTHETIC
from ctxprune.tasks.needle import NeedleConfig
from ctxprune.tasks.overwrite import OverwriteConfig
from ctxprune.tasks.recall import RecallConfig
from pipelines.policy_study.small_model import Shape, build, row_scores, stages, train

EASY = RecallConfig(length=14, fewest=2, facts=4, decoys=0)


@pytest.mark.parametrize("look_back", [True, False])
def test_one_head_looks_at_the_previous_token_before_any_training_if_asked_to(look_back):
    model = build(100, Shape(look_back=look_back), seed=0).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 100, (4, 200), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        first, second = model(ids, output_attentions=True).attentions
    assert (first[:, 0].diagonal(-1, 1, 2).mean() > 0.9) == look_back
    assert first[:, 1].diagonal(-1, 1, 2).mean() < 0.1 and second.diagonal(-1, 2, 3).mean() < 0.1


def test_the_same_seed_gives_the_same_model_and_another_one_another():
    def weights(seed):
        return torch.cat([p.flatten() for p in train(EASY, steps=3, seed=seed, batch=4).parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


@pytest.mark.parametrize("config", SYNTHETIC, ids=lambda config: config.name)
def test_easier_tasks_come_first_and_share_the_vocabulary(config):
    task = config()
    plan = stages(task)
    assert plan[-1] == (1.0, task) and sum(share for share, _ in plan[:-1]) < 1
    assert all(easier.symbols == task.symbols and easier.length < task.length for _, easier in plan[:-1])


@pytest.mark.parametrize("config", SYNTHETIC, ids=lambda config: config.name)
def test_every_synthetic_task_trains(config):
    seen = []
    model = train(
        config(), Shape(hidden=16), 3, progress=lambda step, right: seen.append((step, right)), batch=2, mixed=0.1
    )
    assert [step for step, _ in seen] == [1, 2, 3] and not model.training
    scores = row_scores(model, config(), rows=5, batch=2)
    assert scores.shape == (5,) and ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize(
    "task",
    [
        RecallConfig(length=5, facts=1, decoys=0),
        RecallConfig(length=44, fewest=8, keys=14),
        OverwriteConfig(length=20, fewest=6, variables=6, writes=6, values=6, keys=6),
        OverwriteConfig(length=5, variables=1, writes=1),
        NeedleConfig(length=5),
    ],
)
def test_a_tightly_packed_task_has_stages_too(task):
    assert all(easier.batch("train", 0, 0, 4).input_ids.max() < task.vocab_size for _, easier in stages(task))


def test_what_is_trained_is_saved_loaded_and_pruned_as_any_llama(tmp_path):
    model = train(EASY, steps=2, batch=2)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = EASY.batch("test", 0, 0, 2).input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)
        pruned = ctxprune.retrofit(loaded, ctxprune.DenseConfig())
        assert torch.equal(model(ids).logits, pruned(ids).logits)


@pytest.mark.slow
def test_three_hundred_steps_leave_the_plateau():
    """Who guesses one of the facts of a row is right in 0.36 of the questions: a half, a third or a quarter by row."""
    model = train(EASY, steps=300, seed=0)
    assert row_scores(model, EASY, rows=256).mean() > 0.7


@pytest.mark.parametrize("fields", [{"layers": 1}, {"heads": 0}, {"hidden": 6, "heads": 2}])
def test_a_shape_that_cannot_be_built_is_refused(fields):
    with pytest.raises(UserError, match="give 2 layers or more"):
        Shape(**fields)
