"""What holds for every test?

No word to the network: a test that tries fails, whoever swallowed the error. And tensors have the shapes that the
annotations of ctxprune promise: checked here, never at run time.
"""

from __future__ import annotations

import ipaddress
import os
import socket

import pytest

# Before any library reads it. Workers side by side would take each other's cores with threads of their own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"
# Without a GPU, Triton kernels run in Python; Triton decides when they are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Modules whose signatures carry shapes. Not kernels: it checks its arguments itself, and Triton reads its own source.
install_import_hook(
    [
        f"ctxprune.{name}"
        for name in ("attention", "text.batches", "cache.pruned_cache", "calls", "decoding", "drop_time")
        + ("gate", "generation.generate", "objective", "policies", "visibility", "tasks.task", "tasks.scoring")
        + ("ranking", "ranked_calls", "cache.watched_layer", "replay", "given_scores", "teachers")
        + ("hidden_pruning.layer", "hidden_pruning.prompt", "hidden_pruning.stream")
    ],
    "beartype.beartype",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Of files that are shared out, those with slow tests first: none is left for one worker alone at the end."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow)


def leaves_machine(kind: socket.SocketKind, address: object) -> bool:
    """Whether connecting sends something to another host. A UDP connect does not: Ray asks for its own address so."""
    if not isinstance(address, tuple) or kind == socket.SOCK_DGRAM:
        return False
    try:
        host = ipaddress.ip_address(str(address[0]).split("%")[0])
    except ValueError:
        return address[0] not in ("localhost", "", socket.gethostname())
    return not (host.is_loopback or host.is_unspecified or str(host) in own_addresses())


def own_addresses() -> set[str]:
    """This machine's addresses: what goes to them stays here."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            original_connect(probe, ("192.0.2.1", 9))  # a documentation address (RFC 5737); UDP: no packet is sent
        except OSError:
            return set()
        return {probe.getsockname()[0]}


original_connect = socket.socket.connect


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch):
    """Refuse every connection to another host, and fail the test at its end even if the refusal was caught.

    A test that means to try takes the fixture and clears the list it returns.
    """
    attempts: list[object] = []

    def guard(original):
        def connect(self: socket.socket, address):
            if leaves_machine(self.type, address):
                attempts.append(address)
                raise ConnectionRefusedError(f"tests stay on this machine: {address}")
            return original(self, address)

        return connect

    monkeypatch.setattr(socket.socket, "connect", guard(socket.socket.connect))
    monkeypatch.setattr(socket.socket, "connect_ex", guard(socket.socket.connect_ex))
    yield attempts
    assert not attempts, f"the test tried to reach {attempts}"
