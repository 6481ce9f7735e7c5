"""Is a mistake in settings one line that says what to do, whoever makes it?"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import ctxprune
from ctxprune import UserError, policies
from ctxprune.given_scores import given
from ctxprune.policies import Budget, GivenConfig, H2OConfig
from tests.models import LAYERS, small_model


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"policy": "h2o", "budget": {"shares": 0.5}}, "no setting 'shares'"),
        ({"policy": "h2o", "budgets": 0.25}, "no setting 'budgets'"),
        ({"policy": "window"}, "window needs widths"),
    ],
)
def test_settings_of_a_policy(values, said):
    with pytest.raises(UserError, match=said) as caught:
        policies.from_dict(values)
    assert "\n" not in str(caught.value)
    assert policies.from_dict({"policy": "h2o", "budget": {"share": 0.5}}) == H2OConfig(Budget(share=0.5))


@pytest.mark.parametrize(
    ("choices", "chunk", "said"),
    [([3, 3], 4, "each once"), ([3, 5000], 4, "from 0 to"), ([3, -1], 4, "from 0 to"), ([3, 4], -1, "chunk is -1")],
)
def test_choices_of_a_cascade(choices, chunk, said):
    model = ctxprune.retrofit(small_model(), H2OConfig(Budget(share=0.5), sinks=1, recent=1))
    with pytest.raises(UserError, match=said):
        ctxprune.Cascade(model, torch.tensor(choices), 4, chunk=chunk)
    with pytest.raises(UserError, match="no questions"):
        ctxprune.Cascade(model, torch.tensor([3, 4]), 4).ask([])


def test_scores_that_are_handed_over():
    model = ctxprune.retrofit(small_model(), GivenConfig(Budget(share=0.5)))
    scores = torch.rand(LAYERS, 2, 8)
    with pytest.raises(UserError, match="not a number"), given(model, scores.masked_fill(scores > 0.5, torch.nan)):
        pass
    with given(model, scores):
        pass


WRONG_TYPES = """
import json, torch
import ctxprune
from ctxprune import policies
from ctxprune.given_scores import given
from tests.models import small_model
said = []
for values in (
    {"policy": "h2o", "budget": 0.25},
    {"policy": "h2o", "sinks": None},
    {"policy": "h2o", "budget": {"share": "0.5"}},
    {"policy": "h2o", "budget": {"tokens": 20.5}},
):
    try:
        policies.from_dict(values)
    except ctxprune.UserError as error:
        said.append(str(error))
model = ctxprune.retrofit(small_model(), policies.GivenConfig(policies.Budget(share=0.5)))
try:
    given(model, torch.rand(3, 2, 1, 8)).__enter__()
except ctxprune.UserError as error:
    said.append(str(error))
model = ctxprune.retrofit(small_model(), ctxprune.GateConfig())
for prompts in (torch.arange(4), [1, 2, 3]):  # one prompt is no batch
    try:
        ctxprune.generate(model, prompts)
    except ctxprune.UserError as error:
        said.append(str(error))
print(json.dumps(said))
"""


def test_values_of_a_wrong_type():
    """In a process of its own: here types are checked as they are called."""
    done = subprocess.run([sys.executable, "-c", WRONG_TYPES], capture_output=True, text=True, check=True)
    budget, sinks, share, tokens, scores, *prompts = json.loads(done.stdout)
    assert "ctxprune.policies.Budget" in budget and "sinks=None" in sinks and "share is '0.5'" in share
    assert "tokens is 20.5" in tokens and "scores are (layers, batch, positions)" in scores
    assert len(prompts) == 2 and all("give a list of them" in said for said in prompts)
