"""The loop's schedule and rows, and what every ZeRO stage must agree on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ctxprune import checkpoint
from ctxprune.drop_time import drop_times
from ctxprune.text.token_store import write_tokens
from ctxprune.text.tokenizer import encode_documents, train_tokenizer
from pipelines import engine, store, training
from pipelines.config import Config, EngineConfig, ModelConfig, PruningConfig, TrainConfig, to_record
from pipelines.models import from_scratch
from pipelines.worker import Job, work

TEXT = [
    f"number {i} follows {i - 1} and then comes {i + 1}; the rest is silence, said the {i}th of them\n" * 6
    for i in range(60)
]


def plan(**train) -> training.Plan:
    settings = TrainConfig(**{"steps": 100, "warmup": 0.1, "decay": 0.2, **train})
    return training.Plan(settings.steps, 1.0, 1.0, settings, PruningConfig(), True)


def test_the_learning_rate_rises_stays_and_falls():
    factors = [training.learning_rate_factor(step / 100, step, plan()) for step in range(100)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert factors[10:80] == pytest.approx([1.0] * 70)
    assert all(a > b for a, b in itertools.pairwise(factors[80:])) and factors[-1] == pytest.approx(0.05)


def test_without_decay_the_learning_rate_stays_constant_as_in_the_paper():
    assert training.learning_rate_factor(0.999, 99, plan(decay=0.0)) == 1.0


def test_metrics_rows_are_strict_json(tmp_path):
    append = training._appender(tmp_path / "metrics.jsonl")
    append({"kind": "train", "loss": float("nan")})
    append({"kind": "train", "loss": 1.5})
    assert [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [None, 1.5]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = train_tokenizer(TEXT, 300)
    ids = encode_documents(tokenizer, TEXT, None)
    write_tokens(folder, ids[:50], ids[50:], tokenizer)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    shape = ModelConfig(layers=2, width=32, heads=2, kv_heads=1)
    from_scratch(shape, 300, 0, 32, 0).save_pretrained(folder)
    return folder


def job_for(root: Path, corpus: Path, base: Path, **engine) -> Job:
    config = Config()
    # A fixed gamma: calibration of a target would hide differences of the training behind its own tolerance.
    config.pruning = PruningConfig(policy="learned", gamma=0.3, rank=4, beta=0.02)
    config.train = TrainConfig(steps=6, batch=4, context=32, log_every=2, learning_rate=1e-3)
    config.evaluate.tokens, config.evaluate.batch, config.evaluate.contexts = 1024, 4, [32]
    for name, value in engine.items():
        setattr(config.engine, name, value)
    inputs = {"test": True, **engine}
    return Job("train", to_record(config), str(root), str(corpus), str(base), inputs, {"evaluate": True, **engine})


def _group(rank: int, world: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)


def _process(rank: int, world: int, port: int, job: dict) -> None:
    _group(rank, world, port)
    work(Job(**job))
    torch.distributed.destroy_process_group()
    # DeepSpeed keeps process groups, so their Gloo threads outlive the line above; one that lets go of a tensor while
    # the interpreter shuts down aborts the process (about 1 in 120; pytorch issue 190489). Ray kills its workers.
    os._exit(0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(job: Job, world: int) -> Path:
    """The job in `world` fresh processes, as Ray would start them; its folder."""
    torch.multiprocessing.start_processes(
        _process, (world, free_port(), dataclasses.asdict(job)), nprocs=world, start_method="spawn"
    )
    return job.folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus, base) -> Path:
    """The reference: one process, ZeRO 0, float32."""
    return run(job_for(tmp_path_factory.mktemp("alone"), corpus, base), 1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_workers_under_any_zero_stage_train_the_same_model(tmp_path, corpus, base, alone, zero):
    folder = run(job_for(tmp_path, corpus, base, zero=zero), 2)
    one, two = (checkpoint.load(f / "model") for f in (alone, folder))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-4), f"{name} differs by {(a - b).abs().max():.1e}"
    rows = [[json.loads(line) for line in (f / "metrics.jsonl").read_text().splitlines()] for f in (alone, folder)]
    assert [r["step"] for r in rows[0]] == [r["step"] for r in rows[1]]
    assert np.allclose([r["sparsity"] or 0 for r in rows[0]], [r["sparsity"] or 0 for r in rows[1]], atol=0.02)


@pytest.mark.slow
def test_bfloat16_trains_and_is_stored_as_bfloat16(tmp_path, corpus, base):
    folder = run(job_for(tmp_path, corpus, base, zero=1, dtype="bfloat16"), 1)
    model = checkpoint.load(folder / "model")
    assert next(model.parameters()).dtype == torch.bfloat16
    assert drop_times(model, torch.randint(0, 300, (2, 32))).drop_time.shape == (2, 2, 32)


def _start_in_bfloat16(rank: int, port: int, base: str) -> None:
    _group(rank, 1, port)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = EngineConfig(dtype="bfloat16")
    wrapped = engine.start(model, [{"params": list(model.parameters())}], settings, TrainConfig(batch=1), 1)
    assert {p.dtype for p in wrapped.module.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in wrapped.module.named_buffers() if "inv_freq" in name} == {torch.float32}
    os._exit(0)


@pytest.mark.slow
def test_under_bfloat16_positions_are_not_rounded(base):
    torch.multiprocessing.start_processes(_start_in_bfloat16, (free_port(), str(base)), nprocs=1, start_method="spawn")


@pytest.mark.slow
def test_a_finished_job_is_not_trained_again(alone, corpus, base):
    before = (alone / "model" / "model.safetensors").stat().st_mtime_ns
    run(job_for(alone.parent, corpus, base), 1)
    assert (alone / "model" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_evaluation_stands_beside_the_model(alone, corpus, base):
    job = job_for(alone.parent, corpus, base)
    record = json.loads((job.evaluation / "evaluation.json").read_text())
    assert store.finished(job.evaluation) and 0 < record["sparsity"] < 1 and record["perplexity"] > 1


@pytest.fixture
def alone_in_a_group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_the_teacher_goes_where_the_model_is(alone_in_a_group, monkeypatch):
    class Teacher(torch.nn.Module):
        def to(self, device):
            self.device = device
            return self

    wrapped = SimpleNamespace(device="where the model is", train=lambda: None)
    monkeypatch.setattr(training.engines, "start", lambda *_: wrapped)
    monkeypatch.setattr(training.engines, "full_weights", lambda *_: None)
    nothing, teacher = plan(steps=1), Teacher()
    nothing.steps, nothing.gated = 0, False
    training.run(torch.nn.Linear(1, 1), teacher, Config(), nothing, None, None)
    assert teacher.device == "where the model is"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_step(alone_in_a_group, value):
    training._refuse_non_finite(torch.tensor(1.0), 6)
    with pytest.raises(FloatingPointError, match="step 7 is not finite"):
        training._refuse_non_finite(torch.tensor(value), 7)


def test_the_private_switch_that_keeps_deepspeed_from_compiling_still_exists():
    from deepspeed.ops import __compatible_ops__

    assert "deepspeed_shm_comm" in __compatible_ops__
