"""Which model does a job train: families from scratch, policies of one budget, folders a person may name?"""

from __future__ import annotations

import pytest
import torch

import ctxprune
from ctxprune.budget import measure
from ctxprune.checkpoint import model_folder
from ctxprune.errors import UserError
from ctxprune.text.batches import Batch
from ctxprune.text.token_store import TokenStore, pack
from pipelines.config import Config, ModelConfig, PruningConfig
from pipelines.models import calibration, from_scratch, policy_for
from pipelines.ranges import RANKED

SHAPE = {"layers": 2, "width": 32, "heads": 2, "kv_heads": 1}


@pytest.fixture(scope="module")
def corpus() -> TokenStore:
    rng = torch.Generator().manual_seed(0)
    documents = [torch.randint(1, 64, (n,), generator=rng).numpy() for n in (300, 900, 90, 2000, 700) for _ in range(8)]
    split = pack(documents, 64)
    return TokenStore(split, split, 64, "none")


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "mistral", "gpt_neox"])
def test_every_family_can_be_made_from_scratch_and_retrofitted(family):
    model = from_scratch(ModelConfig(family=family, **SHAPE), 64, 0, 48, seed=1)
    again = from_scratch(ModelConfig(family=family, **SHAPE), 64, 0, 48, seed=1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    ctxprune.retrofit(model, ctxprune.GateConfig(rank=4))
    assert model(torch.zeros(1, 48, dtype=torch.long), use_cache=False).logits.shape == (1, 48, 64)


SPARSITIES = (0.5, 0.8, 0.9)
BUDGETS = [(policy, sparsity) for policy in ("window", "strided", RANKED[0]) for sparsity in SPARSITIES]
BUDGETS += [(policy, SPARSITIES[place % 3]) for place, policy in enumerate(RANKED[1:])]
"""All that rank keys are solved by the same code: every sparsity for one of them, one for each of the others."""


@pytest.mark.parametrize(("policy", "sparsity"), BUDGETS)
def test_fixed_rules_meet_the_budget_on_training_text(corpus, policy, sparsity):
    config = Config(pruning=PruningConfig(policy=policy, sparsity=sparsity))
    config.train.context = 128
    solved = policy_for(config, 4, corpus)
    model = from_scratch(ModelConfig(**{**SHAPE, "layers": 4}), 64, 0, 128, 0)
    ctxprune.retrofit(model, solved)
    batches = [Batch(b.input_ids, b.position_ids) for b in calibration(config, corpus)[:4]]
    assert measure(model.eval(), batches) == pytest.approx(sparsity, abs=0.01)


def test_calibration_windows_are_the_same_for_every_trial(corpus):
    first, second = Config(), Config(pruning=PruningConfig(policy="window", sparsity=0.5))
    second.evaluate.batch = 3  # what is evaluated is in no hash of a training
    pairs = zip(calibration(first, corpus), calibration(second, corpus), strict=True)
    assert all(torch.equal(a.input_ids, b.input_ids) for a, b in pairs)


@pytest.mark.parametrize("policy", ["learned", "window", RANKED[0]])
def test_a_target_that_protected_tokens_put_out_of_reach_is_refused_before_any_training(corpus, policy):
    config = Config(pruning=PruningConfig(policy=policy, sparsity=0.8))
    config.train.context, config.policy.recent = 128, 60
    with pytest.raises(UserError, match=r"drops? 80% of the context"):
        policy_for(config, 4, corpus)


def test_a_person_may_name_the_trial_the_step_or_the_model(tmp_path):
    inner = tmp_path / "trial" / "train" / "model"
    inner.mkdir(parents=True)
    (inner / "pruning.json").write_text("{}")
    assert {model_folder(folder) for folder in (tmp_path / "trial", inner.parent, inner)} == {inner}
    with pytest.raises(UserError, match=r"no pruning\.json"):
        model_folder(tmp_path)
