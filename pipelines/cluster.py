"""Where do jobs run?

Ray starts DeepSpeed processes, as many jobs at a time as the machine holds; one failure stops no other.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ctxprune.checkpoint import first_line
from ctxprune.errors import UserError
from pipelines import store
from pipelines.config import ClusterConfig
from pipelines.engine import quiet_environment
from pipelines.machine import cores
from pipelines.worker import METRICS, Job, work

POLL_SECONDS = 0.5
PASSED_ON = ("HF_TOKEN", "HF_HOME", "HF_HUB_OFFLINE")
"""Of our environment, to the processes of a cluster that is joined."""


@dataclasses.dataclass
class Failure:
    """Why a job failed: one line, and the traceback if the worker lived to write one."""

    cause: str
    traceback: str
    last_step: int | None


@contextmanager
def connected(cluster: ClusterConfig) -> Iterator[None]:
    """A Ray cluster for the time of a study: the one at cluster.address, else a local one that ends with us. UserError
    where none answers there."""
    # Read when ray is imported: cluster tokens on, worker health asked often (each report waits for it).
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    # "local": else Ray would join whatever RAY_ADDRESS or an earlier `ray start` names.
    how = {"address": cluster.address or "local", "include_dashboard": None if cluster.address else False}
    if cluster.address is None:
        how["num_cpus"] = cores()  # of its own it counts those too that this process may not use
    try:
        _reach(cluster.address)
        # Whether workers see GPUs is said when one connects: a cluster that is joined is asked first.
        gpus = gpus_of(cluster)
        if gpus is None:
            ray.init(**how, log_to_driver=False, logging_level="ERROR")
            gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
            ray.shutdown()
        environment = quiet_environment(cluster.cpus_per_worker, gpus > 0)
        if cluster.address is not None:  # gated models and a shared cache; a local cluster has our environment
            environment |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        ray.init(**how, log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": environment})
    except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
        # Nobody there (ConnectionError), no address, another version of Ray, another token.
        ray.shutdown()
        if cluster.address is None:
            raise
        raise UserError(
            f"no Ray cluster answers at cluster.address={cluster.address} ({first_line(error)}): give auto or "
            "HOST:PORT of one started with `ray start --head`, with RAY_AUTH_MODE=token and the same ~/.ray/auth_token"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _reach(address: str | None) -> None:
    """OSError where nothing listens at host:port: Ray would try for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


def gpus_of(cluster: ClusterConfig) -> int | None:
    """GPUs per process of a job; None where nobody has said and only the cluster that is to be joined knows."""
    if cluster.gpus_per_worker is not None or cluster.address is not None:
        return cluster.gpus_per_worker
    import torch

    return int(torch.cuda.is_available())


def settled(cluster: ClusterConfig) -> ClusterConfig:
    """With its GPUs per process decided; within `connected`."""
    import ray

    gpus = gpus_of(cluster)
    if gpus is None:
        gpus = int(ray.cluster_resources().get("GPU", 0) > 0)
    return dataclasses.replace(cluster, gpus_per_worker=gpus)


def slots(cluster: ClusterConfig) -> int:
    """Jobs at a time: what is asked for, never more than the cluster's cores and GPUs hold."""
    import ray

    cluster, there = settled(cluster), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fits = fitting(cluster, [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in there])
    return min(cluster.concurrency, fits) if cluster.concurrency else fits


def fitting(cluster: ClusterConfig, nodes: list[tuple[int, int]]) -> int:
    """Jobs that machines of so many cores and GPUs hold; a process lies on one of them. UserError for none: Ray would
    wait for more without a word."""
    needs = (cluster.cpus_per_worker, gpus_of(cluster) or 0)
    for place, name in enumerate(("cpus", "gpus")):
        if needs[place] and sum(node[place] // needs[place] for node in nodes) < cluster.workers:
            asked = f"cluster.workers={cluster.workers} x cluster.{name}_per_worker={needs[place]}"
            there = " + ".join(str(node[place]) for node in nodes) or "0"
            raise UserError(f"{asked} is more than the {there} {name} there are: lower one, or join a larger cluster")
    held = sum(min(there // need for there, need in zip(node, needs, strict=True) if need) for node in nodes)
    if held < cluster.workers:
        raise UserError(
            f"cluster.workers={cluster.workers}, each with {needs[0]} cpus and {needs[1]} gpus: the machines there are "
            f"hold {held}: lower one, or join a larger cluster"
        )
    return held // cluster.workers


def run_jobs(
    jobs: list[tuple[str, Job]],
    cluster: ClusterConfig,
    watch: Callable[[str, dict], None],
    ended: Callable[[str, Failure | None], None],
) -> None:
    """Run named jobs, a bounded number at a time. watch gets each job's newest metrics row, ended its fate."""
    import ray

    cluster = settled(cluster)
    launch = ray.remote(num_cpus=0, max_retries=0)(_fit)
    waiting, running, limit = list(jobs), {}, slots(cluster)
    while waiting or running:
        while waiting and len(running) < limit:
            name, job = waiting.pop(0)
            _failure_path(job).unlink(missing_ok=True)
            running[launch.remote(dataclasses.asdict(job), dataclasses.asdict(cluster))] = (name, job)
        done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
        for name, job in running.values():
            if row := _newest_row(job):
                watch(name, row)
        for reference in done:
            name, job = running.pop(reference)
            try:
                ray.get(reference)
            except ray.exceptions.RayError as error:
                ended(name, _failure(job, error))
            else:
                ended(name, None)


def _fit(job: dict, cluster: dict) -> None:
    """One DeepSpeed job as a Ray Train run (inside a Ray task)."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    resources = {"CPU": cluster["cpus_per_worker"]}
    if cluster["gpus_per_worker"]:
        resources["GPU"] = cluster["gpus_per_worker"]
    TorchTrainer(
        _loop,
        train_loop_config={"job": json.dumps(job), "threads": cluster["cpus_per_worker"]},
        torch_config=TorchConfig(backend="nccl" if cluster["gpus_per_worker"] else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cluster["workers"],
            use_gpu=bool(cluster["gpus_per_worker"]),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(name=f"{Job(**job).folder.name}-{time.time_ns()}", storage_path=f"{job['store']}/ray"),
    ).fit()


def _loop(settings: dict) -> None:
    """What each worker process runs."""
    import torch

    torch.set_num_threads(settings["threads"])
    job = Job(**json.loads(settings["job"]))
    try:
        work(job)
    except BaseException as error:  # an interruption too leaves its cause behind; it goes on its way below
        text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        record = {"cause": text, "traceback": traceback.format_exc(), "rank": torch.distributed.get_rank()}
        if not _failure_path(job).exists():
            store.write_json(_failure_path(job), record)
        raise


def _failure_path(job: Job) -> Path:
    folder = job.evaluation or job.folder  # trials that share a training fail for reasons of their own
    return folder.with_name(f".{folder.name}.failure.json")


def _failure(job: Job, error: Exception) -> Failure:
    """The cause as the worker told it; a worker that was killed tells nothing, and that is said."""
    row, path = _newest_row(job), _failure_path(job)
    step = row["step"] if row else None
    if path.is_file():
        told = json.loads(path.read_text())
        return Failure(f"{told['cause']} (rank {told['rank']})", told["traceback"], step)
    lines = [line for line in str(error).splitlines() if line.strip()]
    last = lines[-1].strip() if lines else type(error).__name__
    return Failure(
        f"a worker died without a word (killed, or out of memory): {last}",
        "".join(traceback.format_exception(error)),
        step,
    )


def _newest_row(job: Job) -> dict | None:
    """The last whole line of the job's metrics so far."""
    for folder in (job.evaluation, job.folder):
        if folder is None:
            continue
        path = store.staging_of(folder) / METRICS
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in reversed(lines[-2:]):
            try:
                return json.loads(line)
            except ValueError:
                continue
    return None
