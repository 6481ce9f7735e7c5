"""What comes back beside the weights: a trial's model, how transformers writes, a policy of one's own?"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import ctxprune
from ctxprune import UserError, policies
from ctxprune.checkpoint import load, save
from ctxprune.policies import RecencyConfig
from ctxprune.policies.budget import Budget
from tests.models import gated, small_model, tokens


def test_a_trials_folder_is_as_good_as_its_model(tmp_path):
    save(gated(), tmp_path / "TRIAL" / "train" / "model")
    ids = tokens(1, 12)
    with torch.no_grad():
        wanted = load(tmp_path / "TRIAL" / "train" / "model")(ids).logits
        assert torch.equal(load(tmp_path / "TRIAL")(ids).logits, wanted)


def test_how_transformers_writes_with_it_comes_back(tmp_path):
    model = gated()
    model.generation_config.eos_token_id, model.generation_config.top_k = [3, 5], 7
    save(model, tmp_path / "model")
    back = load(tmp_path / "model").generation_config
    assert (back.eos_token_id, back.top_k) == ([3, 5], 7)


@dataclass(frozen=True, kw_only=True)
class OwnConfig(RecencyConfig):
    policy = "own"


def test_a_policy_of_ones_own_is_saved_and_loaded_once_it_is_registered(tmp_path, monkeypatch):
    monkeypatch.setattr(policies, "POLICIES", dict(policies.POLICIES))
    model = ctxprune.retrofit(small_model(), OwnConfig(when="step", budget=Budget(share=0.5)))
    with pytest.raises(UserError, match=r"policies\.register\(OwnConfig\)"):
        save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    assert policies.register(OwnConfig) is OwnConfig and policies.register(OwnConfig) is OwnConfig
    save(model, tmp_path / "model")
    with torch.no_grad():
        ids = tokens(1, 20)
        assert torch.equal(load(tmp_path / "model")(ids).logits, model(ids).logits)
    again = type("OwnConfig", (RecencyConfig,), {"policy": "own"})  # a notebook's cell, run twice
    again.__module__ = OwnConfig.__module__
    assert policies.register(again) is policies.POLICIES["own"] is again
    with pytest.raises(UserError, match="is the name of RecencyConfig"):
        policies.register(type("OtherConfig", (OwnConfig,), {"policy": "recency"}))


def test_transformers_own_saving_warns_that_it_cannot_be_loaded(tmp_path):
    with pytest.warns(UserWarning, match=r"use ctxprune\.save"):
        gated().save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()
