"""Does every room import only what it may, and stay small enough to read?"""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORCHESTRATION = {"hydra", "omegaconf", "ray", "deepspeed", "wandb", "matplotlib", "pipelines"}
KERNELS = "ctxprune.kernels"
FORBIDDEN = {"ctxprune": ORCHESTRATION, "ctxprune/kernels": ORCHESTRATION | {"ctxprune"}}


def imported(source: str) -> set[str]:
    """First name of every import, those inside functions too; ctxprune.kernels is a name of its own."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {KERNELS if f"{name}.".startswith(f"{KERNELS}.") else name.split(".")[0] for name in found}


def sources(*folders: str) -> list[Path]:
    """Python files below the folders."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_a_room_imports_only_what_it_may(folder):
    files = sources(folder)
    assert files
    wrong = {str(path.relative_to(ROOT)): imported(path.read_text()) & FORBIDDEN[folder] for path in files}
    assert not {path: names for path, names in wrong.items() if names}


def test_an_import_hidden_in_a_function_is_found():
    assert imported("def f():\n    from ray import train\n    import wandb.sdk") == {"ray", "wandb"}


def test_kernels_may_import_each_other_and_nothing_else_of_ctxprune():
    assert imported("from ctxprune import kernels\nimport ctxprune.kernels.decode.pages") == {KERNELS}
    assert imported("from ctxprune import decoding") == imported("import ctxprune.kernels_of") == {"ctxprune"}


def test_configuration_names_no_code():
    files = sorted((ROOT / "conf").rglob("*.yaml"))
    assert files
    for path in files:
        assert not re.search(r"_target_|_partial_|\$\{", path.read_text()), path


def test_configuration_is_never_instantiated():
    for path in sources("pipelines", "ctxprune"):
        assert not re.search(r"hydra\.utils|instantiate\(|trust_remote_code\s*=\s*True|torch\.hub", path.read_text()), (
            path
        )


def test_every_source_file_stays_below_300_lines():
    paths = [*sources("pipelines", "ctxprune"), ROOT / "launch.sh"]
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in paths}
    assert not {path: lines for path, lines in long.items() if lines >= 300}


def test_a_mistake_is_answered_without_importing_torch():
    script = "import sys, pipelines.__main__; print(sorted({'torch', 'transformers', 'ray'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_guard_refuses_another_host_and_remembers(no_network):
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError, match="tests stay on this machine"):
        probe.connect(("203.0.113.1", 80))
    assert no_network == [("203.0.113.1", 80)]
    no_network.clear()


def test_the_guard_lets_loopback_through():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with socket.create_connection(listener.getsockname(), timeout=2) as client:
            assert client.getpeername() == listener.getsockname()
