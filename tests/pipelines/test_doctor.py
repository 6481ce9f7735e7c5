"""Does the doctor say what is wrong, and only then that the demo cannot run?"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines import doctor
from pipelines.config import Config
from pipelines.doctor import Finding

ROOT = Path(__file__).resolve().parents[2]


def test_the_doctor_examines_this_machine_and_writes_nothing(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "token", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, "-P", "-m", "pipelines", "doctor", "format=json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    found = {row["what"]: row["status"] for row in rows}
    assert {"python", "torch", "transformers", "deepspeed", "ray", "hydra", "disk", "cores", "memory"} <= set(found)
    assert all(set(row) == {"what", "status", "detail"} and row["status"] in ("ok", "warn", "no") for row in rows)
    assert rows[-1]["what"] == "demo" and done.returncode == (0 if rows[-1]["status"] == "ok" else 1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("findings", "code", "last"),
    [
        ([Finding("a", "ok", "x", True), Finding("cuda", "no", "none")], 0, "ok    demo: can run here: ./launch.sh"),
        ([Finding("a", "no", "x", True), Finding("b", "no", "y", True)], 1, "no    demo: cannot run here: a, b"),
        ([Finding("a", "warn", "x", True)], 0, "ok    demo: can run here: ./launch.sh"),
    ],
)
def test_the_demo_is_blocked_by_what_it_needs_alone(findings, code, last, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda config: iter(findings))
    assert doctor.main(Config(), []) == code
    assert capsys.readouterr().out.splitlines()[-1] == last


def test_a_stale_lock_is_named_with_its_age(tmp_path, monkeypatch):
    lock = tmp_path / "shm_comm" / "lock"
    lock.parent.mkdir()
    lock.touch()
    os.utime(lock, (time.time() - 600, time.time() - 600))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    (finding,) = doctor.locks()
    assert finding.status == "warn" and f"{lock}, 10 minutes old: delete it" in finding.detail
    lock.unlink()
    assert [f.status for f in doctor.locks()] == ["ok"]


def test_a_missing_token_mode_is_a_warning(monkeypatch):
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    assert [f.status for f in doctor.authentication()] == ["warn"]
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert [f.status for f in doctor.authentication()] == ["ok"]


def test_a_full_disk_and_a_file_in_the_way_block(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (finding,) = doctor.disk(tmp_path / "file")
    assert finding.status == "no" and "not a folder you may write to" in finding.detail
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5e8}))
    (finding,) = doctor.disk(tmp_path / "runs")
    assert finding.status == "no" and "the demo needs 1 GB" in finding.detail
    assert not (tmp_path / "runs").exists()


def test_an_open_dashboard_port_is_a_warning(monkeypatch):
    real = socket.socket.connect_ex
    monkeypatch.setattr(socket.socket, "connect_ex", lambda self, a: 0 if a[1] == 8265 else real(self, a))
    found = {f.what: f for f in doctor.ports()}
    assert found["port 8265"].status == "warn" and "stop it" in found["port 8265"].detail


def test_a_broken_part_is_a_finding():
    def torch():
        raise ImportError("libcudart.so.13: cannot open\nmore")
        yield

    (finding,) = doctor._guarded("torch", torch)
    assert finding == Finding("torch", "no", "ImportError: libcudart.so.13: cannot open", True)


def test_a_deepspeed_that_does_not_import_blocks():
    command = [sys.executable, "-c", "print('noise'); raise SystemExit('no module named x')"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finding = doctor.deepspeed(child, time.monotonic())
    assert finding.status == "no" and finding.needed and "no module named x" in finding.detail
    assert doctor.deepspeed(None, 0.0).status == "no"
