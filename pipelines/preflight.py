"""Can this study run at all?

Every mistake a person can mend is found before anything is written or any process started, but for one: a sparsity
that protected tokens put out of reach is seen in the tokenised text, and that trial fails.
"""

from __future__ import annotations

import netrc
import os

import torch
from transformers import AutoModelForCausalLM

from ctxprune import checkpoint
from ctxprune.errors import UserError
from ctxprune.policies import GateConfig
from ctxprune.retrofitting import retrofit
from ctxprune.text.tokenizer import load_tokenizer
from pipelines.cluster import connected, fitting, slots
from pipelines.config import ClusterConfig, Config, TrackingConfig
from pipelines.machine import cores


def check_model(config: Config) -> None:
    """UserError if the pretrained model of a trial is incomplete, of a family that cannot be retrofitted, too short, or
    paired with a tokenizer that does not match. Weights are not read: only names, shapes and the tokenizer."""
    path = config.model.path
    if path is None:
        return
    found = checkpoint.base_config(path, config.train.context)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is no causal language model: {checkpoint.first_line(error)}") from error
    retrofit(model, GateConfig(rank=1))
    positions = getattr(found, "max_position_embeddings", None)
    longest = config.benchmark.prompt + config.benchmark.new_tokens
    if positions is not None and positions < longest:
        raise UserError(
            f"benchmark.prompt + benchmark.new_tokens is {longest}, more than the {positions} positions of {path}: "
            "lower one"
        )
    entries = len(load_tokenizer(path))
    if entries > model.config.vocab_size:
        raise UserError(
            f"the tokenizer in {path} has {entries} entries, its model only {model.config.vocab_size}: "
            "they do not belong together; put the model's own tokenizer there"
        )


def check_cluster(cluster: ClusterConfig) -> None:
    """UserError for a job that needs more than this machine has, or the cluster that is to be joined; and where that
    does not answer."""
    if cluster.address is None:
        fitting(cluster, [(cores(), torch.cuda.device_count())])
        return
    with connected(cluster):
        slots(cluster)


def check_tracking(tracking: TrackingConfig) -> None:
    """UserError if results are to go online without a key: W&B would ask for it in the middle of a study."""
    if tracking.mode != "online" or os.environ.get("WANDB_API_KEY"):
        return
    try:
        known = netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    if not known:
        raise UserError(
            "tracking=online needs a W&B key: set WANDB_API_KEY or run `wandb login`, or use tracking=offline"
        )
