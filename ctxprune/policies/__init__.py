"""Which rules say what context stays? One file each; all of them are drop times.

A policy is a small config dataclass. `config.rules(layers, width, kv_heads)` gives one Rule (ctxprune.policies.rule)
for each layer of a model of that hidden width and so many KV heads: a learned gate, a lifetime by position, or a
ranking of keys. Protected tokens (`sinks`, `recent`) are the same for every policy and handled once.

A new way to rank keys is a file with a RankedConfig and its Scorer, one number per key, named in HEURISTIC or TAUGHT
below. Budgets, heads that decide apart, packed documents, padding, chunks and the cache then come along, and the tests
of tests/ctxprune/test_policy_matrix.py run over it. A policy that lives outside ctxprune is made known by `register`.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, fields
from difflib import get_close_matches

from ctxprune.errors import UserError
from ctxprune.policies.bandit import BanditConfig
from ctxprune.policies.bigbird import BigBirdConfig
from ctxprune.policies.budget import Budget
from ctxprune.policies.dense import DenseConfig
from ctxprune.policies.dms import DMSConfig
from ctxprune.policies.frequency import FrequencyConfig
from ctxprune.policies.given import GivenConfig
from ctxprune.policies.h2o import H2OConfig
from ctxprune.policies.hidden_scorer import AgentConfig, DistilledConfig, FutureConfig
from ctxprune.policies.key_norm import KeyNormConfig
from ctxprune.policies.keydiff import KeyDiffConfig
from ctxprune.policies.learned import GateConfig
from ctxprune.policies.ltp import LTPConfig
from ctxprune.policies.random_keys import RandomConfig
from ctxprune.policies.ranked import RankedConfig
from ctxprune.policies.recency import RecencyConfig
from ctxprune.policies.snapkv import SnapKVConfig
from ctxprune.policies.strided import StridedConfig
from ctxprune.policies.strided_keys import StridedKeysConfig
from ctxprune.policies.tova import TovaConfig
from ctxprune.policies.window import WindowConfig

PolicyConfig = DenseConfig | GateConfig | WindowConfig | StridedConfig | RankedConfig
BY_POSITION = (DenseConfig, GateConfig, WindowConfig, StridedConfig)
HEURISTIC = (
    RandomConfig,
    RecencyConfig,
    StridedKeysConfig,
    BigBirdConfig,
    FrequencyConfig,
    KeyNormConfig,
    KeyDiffConfig,
    H2OConfig,
    TovaConfig,
    SnapKVConfig,
)
TAUGHT = (FutureConfig, DistilledConfig, AgentConfig, BanditConfig, LTPConfig, DMSConfig)
POLICIES: dict[str, type] = {config.policy: config for config in (*BY_POSITION, *HEURISTIC, *TAUGHT, GivenConfig)}


def register(config: type) -> type:
    """Let checkpoints know a policy of one's own by its name (a class decorator): call it before saving and before
    loading. UserError for a name that is another's."""
    name = config.policy  # type: ignore[attr-defined]
    there = POLICIES.get(name, config)
    if (there.__module__, there.__qualname__) != (config.__module__, config.__qualname__):  # else: defined anew
        raise UserError(f"{name!r} is the name of {POLICIES[name].__name__}: give {config.__name__} another")
    POLICIES[name] = config
    return config


def to_dict(config: PolicyConfig) -> dict[str, object]:
    """Plain values, the policy's name first: what a checkpoint's pruning.json holds."""
    return {"policy": config.policy, **asdict(config)}


def from_dict(values: dict[str, object]) -> PolicyConfig:
    """The inverse of to_dict; UserError on an unknown policy or field."""
    values = dict(values)
    name = values.pop("policy", None)
    if name not in POLICIES:
        near = get_close_matches(str(name), POLICIES, 1, 0.0)[0]
        raise UserError(f"unknown policy {name!r}; nearest: {near} (there are {', '.join(POLICIES)})")
    known = {field.name for field in fields(POLICIES[name])}
    if unknown := sorted(set(values) - known):
        raise UserError(f"policy {name} has no setting {unknown[0]!r}: it has {', '.join(sorted(known))}")
    budget = values.get("budget")
    if isinstance(budget, dict):
        if unknown := sorted(set(budget) - {field.name for field in fields(Budget)}):
            raise UserError(f"policy {name}: a budget has no setting {unknown[0]!r}")
        values["budget"] = Budget(**budget)
    # JSON has no tuples.
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    needed = {field.name for field in fields(POLICIES[name]) if field.default is field.default_factory is MISSING}
    if missing := sorted(needed - set(given)):
        raise UserError(f"policy {name} needs {missing[0]}: give it")
    return POLICIES[name](**given)
