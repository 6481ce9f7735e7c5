"""How is a pruned model kept on disk?

Safetensors, transformers' own config, one readable pruning.json; whole or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ctxprune import policies
from ctxprune.errors import UserError
from ctxprune.policies.budget import Budget
from ctxprune.retrofitting import retrofit, state_of, wrappers

DROPOUT = (
    *("attn_pdrop", "resid_pdrop", "embd_pdrop", "attention_dropout", "hidden_dropout"),
    *("dropout", "activation_dropout", "layerdrop", "hidden_dropout_prob", "attention_probs_dropout_prob"),
)
"""What configs of transformers call it: GPT-2, GPT-NeoX, OPT and their kin."""
FORMAT = 1
"""Version of the folder's layout; a reader refuses a newer one."""
WEIGHTS = "model.safetensors"
PRUNING = "pruning.json"
MANIFEST = "manifest.json"
GENERATION = "generation_config.json"
"""How transformers' own generate writes with it: end of text, sampling."""
BUDGETS = "budgets"
"""In pruning.json: the budget of every layer, where one has another than the policy says (a threshold that was set)."""


def save(
    model: PreTrainedModel, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None, **notes: object
) -> None:
    """Write a retrofitted model to a new folder: weights, config.json, pruning.json, tokenizer, manifest of hashes.

    Written beside, hashed, then renamed: a folder of this name is whole or absent. notes: plain values kept in
    pruning.json. Raises UserError if the folder exists or the model is not retrofitted.
    """
    folder = Path(folder)
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another folder or remove it first")
    state = state_of(model)
    _refuse_unknown(state.policy)
    staged = folder.with_name(f".{folder.name}.{os.getpid()}.staged")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    try:
        save_file(_state_dict(model), staged / WEIGHTS, metadata={"format": "pt"})
        model.config.save_pretrained(staged)
        if model.generation_config is not None:
            model.generation_config.to_json_file(staged / GENERATION)  # save_pretrained would refuse odd settings
        pruning = {"format": FORMAT, "pruning": policies.to_dict(state.policy), "alpha": state.alpha, **notes}
        if (budgets := _budgets(model)) is not None:
            pruning[BUDGETS] = budgets
        _write(staged / PRUNING, json.dumps(pruning, indent=2) + "\n")
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        seal(staged)
        os.rename(staged, folder)
    except BaseException:  # an interruption too must leave nothing half written; it is raised again
        shutil.rmtree(staged, ignore_errors=True)
        raise
    sync(folder.parent)


def load(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> PreTrainedModel:
    """The model that `save` wrote to `folder`, in eval mode. It may be the folder of a trial too.

    Strict: every tensor of the architecture must be there with its shape, and nothing else; the folder must match its
    manifest. Raises UserError that names the first mismatch. No code from the folder is run.
    """
    folder = model_folder(folder)
    pruning = read_pruning(folder)
    verify(folder)
    config = AutoConfig.from_pretrained(folder)
    weights = load_file(folder / WEIGHTS)
    # Built in the precision of the weights, whatever the config says: casting the whole model afterwards would round
    # the float32 tables (rotary frequencies) that a model keeps beside its weights.
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or _most_numbers(weights))
    retrofit(model, policies.from_dict(pruning["pruning"]))
    state_of(model).alpha = pruning["alpha"]
    if BUDGETS in pruning:
        _set_budgets(model, pruning[BUDGETS], folder)
    _put(model, weights, folder)
    if (folder / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.to(device=device).eval()


def _most_numbers(weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The type of most of them: some models keep a few in float32 beside the rest."""
    types = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    return max(types, key=lambda dtype: sum(tensor.numel() for tensor in weights.values() if tensor.dtype == dtype))


def model_folder(folder: str | Path) -> Path:
    """The saved model inside what a person may name: a trial's folder, a training step's folder, or the model itself.
    UserError where there is none."""
    folder = Path(folder)
    for inner in (folder, folder / "model", folder / "train" / "model"):
        if (inner / PRUNING).is_file():
            return inner
    read_pruning(folder)
    return folder


def _refuse_unknown(policy: policies.PolicyConfig) -> None:
    """UserError for a policy that `load` would not find by its name."""
    if policies.POLICIES.get(policy.policy) is not type(policy):
        name = type(policy).__name__
        raise UserError(
            f"{name} is no policy that load knows: call ctxprune.policies.register({name}) first, there too"
        )


def _budgets(model) -> list[dict] | None:
    """Each layer's budget; None where all are the policy's own, or nothing is ranked."""
    rankings = [wrapper.rule.ranking for wrapper in wrappers(model)]
    own = getattr(state_of(model).policy, "budget", None)
    if all(ranking is None or ranking.config.budget == own for ranking in rankings):
        return None
    return [{} if ranking is None else asdict(ranking.config.budget) for ranking in rankings]


def _set_budgets(model, budgets: list[dict], folder: Path) -> None:
    rankings = [wrapper.rule.ranking for wrapper in wrappers(model)]
    if len(budgets) != len(rankings):
        raise UserError(f"{folder / PRUNING} has budgets of {len(budgets)} layers for {len(rankings)}: it is damaged")
    for ranking, budget in zip(rankings, budgets, strict=True):
        if ranking is not None:
            config: Any = ranking.config
            ranking.config = replace(config, budget=Budget(**budget))


def read_pruning(folder: Path) -> dict:
    """pruning.json of a saved model; UserError if the folder is not one."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give the folder of a saved model")
    if not (folder / PRUNING).is_file() or not (folder / WEIGHTS).is_file():
        missing = PRUNING if not (folder / PRUNING).is_file() else WEIGHTS
        raise UserError(f"{folder} has no {missing}: give a folder written by ctxprune.save or a trial")
    try:
        pruning = json.loads((folder / PRUNING).read_text())
        version = int(pruning["format"])
    except (ValueError, KeyError, TypeError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{folder / PRUNING} cannot be read ({type(error).__name__}): the folder is damaged") from error
    if version > FORMAT:
        raise UserError(f"{folder} has format {version}, newer than {FORMAT}: update ctxprune")
    return pruning


def seal(folder: Path) -> None:
    """Write the manifest: sha256 and bytes of every file, each flushed to disk first."""
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        sync(path)
        files[path.relative_to(folder).as_posix()] = {"sha256": digest(path), "bytes": path.stat().st_size}
    _write(folder / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=2) + "\n")


def verify(folder: Path) -> None:
    """UserError that names the first file that is missing or not what the manifest says."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} has no readable {MANIFEST}: the folder is damaged or unfinished") from error
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: the folder is damaged")
        if path.stat().st_size != wanted["bytes"] or digest(path) != wanted["sha256"]:
            raise UserError(f"{path} does not match its hash in {MANIFEST}: the file is damaged")


def digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def base_config(folder_or_id: str, context: int) -> PreTrainedConfig:
    """The config of a pretrained model that is to be retrofitted; no weights are read.

    Raises UserError if there is no such folder, it holds no weights or a pruned model, the config cannot be read, or it
    has fewer positions than `context`.
    """
    folder = Path(folder_or_id)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} has no config.json: give the folder of a transformers model")
        if not any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} has no weights (*.safetensors): give the folder of a trained model")
        if (folder / PRUNING).is_file():
            raise UserError(f"{folder} is a pruned model already: give the original, or use ctxprune.load")
    elif folder_or_id.startswith((".", "/", "~")):
        raise UserError(f"{folder_or_id} does not exist: give a folder with a transformers model, or a hub id")
    try:
        config = AutoConfig.from_pretrained(folder_or_id)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"no model could be read from {folder_or_id}: {first_line(error)}") from error
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and positions < context:
        raise UserError(
            f"{folder_or_id} has {positions} positions, fewer than train.context={context}: "
            f"set train.context={positions} or less"
        )
    return config


def load_base(folder_or_id: str, context: int) -> PreTrainedModel:
    """A pretrained causal language model in float32, its dropout off, ready to be retrofitted.

    Raises UserError for what base_config refuses, and if weights of the architecture are missing.
    """
    config = base_config(folder_or_id, context)
    for name in DROPOUT:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder_or_id, config=config, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"no model could be loaded from {folder_or_id}: {first_line(error)}") from error
    model, report = loaded
    if wrong := sorted(report["missing_keys"]) or sorted(report.get("mismatched_keys") or []):
        raise UserError(f"{folder_or_id} lacks weights of its own architecture, first {wrong[0]}: is it complete?")
    return model


def first_line(error: Exception) -> str:
    """What a library's error says, on one line; its kind where it says nothing."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor once: tied weights are stored under their first name."""
    seen: dict[tuple, str] = {}
    tensors = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:
            continue
        seen[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    return tensors


def _put(model: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Strict loading: the same names and shapes on both sides, or a UserError with the first three differences."""
    wanted = {name: tuple(tensor.shape) for name, tensor in _state_dict(model).items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    different = [
        f"{name}: file {given.get(name, 'nothing')}, model {wanted.get(name, 'nothing')}"
        for name in sorted(set(wanted) | set(given))
        if wanted.get(name) != given.get(name)
    ]
    if different:
        raise UserError(f"{folder / WEIGHTS} is of another architecture ({'; '.join(different[:3])})")
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)
    model.tie_weights()


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
