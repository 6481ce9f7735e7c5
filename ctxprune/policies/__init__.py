"""Which rules say what context stays? One file each; all of them are drop times.

A policy is a small config dataclass. `config.rules(layers, width)` gives one Rule (ctxprune.policies.rule) per layer of
a model of that hidden width. Protected tokens (`sinks`, `recent`) are the same for every policy and handled once, in
ctxprune.visibility.
"""

from __future__ import annotations

from dataclasses import asdict, fields

from ctxprune.errors import UserError
from ctxprune.policies.dense import DenseConfig
from ctxprune.policies.learned import GateConfig
from ctxprune.policies.strided import StridedConfig
from ctxprune.policies.window import WindowConfig

PolicyConfig = DenseConfig | GateConfig | WindowConfig | StridedConfig
POLICIES: dict[str, type] = {config.policy: config for config in (DenseConfig, GateConfig, WindowConfig, StridedConfig)}


def to_dict(config: PolicyConfig) -> dict[str, object]:
    """Plain values, the policy's name first: what a checkpoint's pruning.json holds."""
    return {"policy": config.policy, **asdict(config)}


def from_dict(values: dict[str, object]) -> PolicyConfig:
    """The inverse of to_dict; UserError on an unknown policy or field."""
    values = dict(values)
    name = values.pop("policy", None)
    if name not in POLICIES:
        raise UserError(f"unknown policy {name!r}: choose one of {', '.join(POLICIES)}")
    known = {field.name for field in fields(POLICIES[name])}
    if unknown := sorted(set(values) - known):
        raise UserError(f"policy {name} has no setting {unknown[0]!r}: it has {', '.join(sorted(known))}")
    # JSON has no tuples.
    return POLICIES[name](**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
