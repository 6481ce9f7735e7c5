"""Does launch.sh set up once, whoever interrupts it, and hand over exactly what was typed?

A stand-in for Python records what it is asked, so that nothing is installed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

STAND_IN = """#!/usr/bin/env bash
case "$1 ${2:-}" in
"-c import pip") exit 0 ;;
"-c "*) exit "${OLD_PYTHON:-0}" ;;
"--version ") echo "Python 3.11.0" ;;
"- "*) cat >/dev/null; echo "torch==1"; echo "ray[train]" ;;
"-m venv") mkdir -p "${@: -1}/bin"; cp "$0" "${@: -1}/bin/python"; rm -f "${@: -1}/.incomplete"
           echo "version = 3.11.0" >"${@: -1}/pyvenv.cfg"; echo venv >>"$LOG" ;;
"-m pip") echo "pip start: $*" >>"$LOG"; eval "${PIP:-true}" || exit 1; echo "pip end" >>"$LOG" ;;
*) printf '%s\\n' "$PWD" "$@"; env | grep -E "^(RAY_|DS_|TORCH_EXT|TRITON|PYTHONPATH|OMP|HYDRA|TOKENIZERS)"
   flock -n "$(dirname "$0")/../../.venv.lock" true && echo "the lock is free"; umask ;;
esac
"""


class Clone:
    """A copy of the launcher in a folder with a space, and a person who stands elsewhere."""

    def __init__(self, folder: Path):
        self.root, self.elsewhere, bin = folder / "the clone", folder / "else where", folder / "bin"
        for made in (self.root, self.elsewhere, bin):
            made.mkdir()
        for name in ("launch.sh", "constraints.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("python3", "python3.12", "python3.11"):
            (bin / name).write_text(STAND_IN)
            (bin / name).chmod(0o755)
        self.log = folder / "log"
        kept = {name: value for name, value in os.environ.items() if name in ("HOME", "LANG")}
        self.environment = kept | {"PATH": f"{bin}:/usr/bin:/bin", "LOG": str(self.log)}
        self.venv = self.root / ".venv"

    def start(self, *words: str, **environment: str) -> subprocess.Popen:
        return subprocess.Popen(
            [str(self.root / "launch.sh"), *words],
            cwd=self.elsewhere,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def events(self) -> list[str]:
        return [line.split(":")[0] for line in self.log.read_text().splitlines()] if self.log.exists() else []


@pytest.fixture
def clone(tmp_path) -> Clone:
    return Clone(tmp_path)


def test_without_words_it_runs_the_demo(clone):
    done = clone.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:6] == ["-P", "-m", "pipelines", "sweep", "experiment=demo"]


def test_words_and_folder_arrive_as_typed(clone):
    done = clone.run("generate", "checkpoint=a b", "generate.prompt=def main(*, x): $HOME 'q'")
    folder, *arguments = done.stdout.splitlines()[:7]
    assert folder == str(clone.elsewhere)
    assert arguments == [
        "-P",
        "-m",
        "pipelines",
        "generate",
        "checkpoint=a b",
        "generate.prompt=def main(*, x): $HOME 'q'",
    ]


def test_the_environment_is_what_the_pipeline_relies_on(clone):
    lines = clone.run("train", HYDRA_FULL_ERROR="1").stdout.splitlines()
    assert lines[-1] == "0077"
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    assert found["RAY_AUTH_MODE"] == "token" and found["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "0.2"
    assert found["PYTHONPATH"] == str(clone.root) and found["TORCH_EXTENSIONS_DIR"] == f"{clone.venv}/torch_extensions"
    assert "OMP_NUM_THREADS" not in found and "HYDRA_FULL_ERROR" not in found
    assert found.get("DS_ACCELERATOR") == (None if Path("/dev/nvidiactl").exists() else "cpu")


def test_the_pins_are_used_and_the_second_start_is_quick(clone):
    assert clone.run("train").returncode == 0
    (asked,) = [line for line in clone.log.read_text().splitlines() if line.startswith("pip start")]
    assert asked.endswith(f"-c {clone.root}/constraints.txt torch==1 ray[train]")
    started = time.monotonic()
    done = clone.run("train")
    assert time.monotonic() - started < 2
    assert done.stderr == "" and clone.events() == ["venv", "pip start", "pip end"]


@pytest.mark.parametrize("name", ["constraints.txt", "pyproject.toml", ".venv/pyvenv.cfg"])
def test_another_pin_or_python_sets_up_again(clone, name):
    clone.run("train")
    with (clone.root / name).open("a") as file:
        file.write("\nversion = other\n")
    clone.run("train")
    assert clone.events().count("pip end") == 2


@pytest.mark.parametrize("interruption", ["false", "kill -9 $PPID; exit 1"])
def test_an_interrupted_set_up_is_not_taken_for_a_finished_one(clone, interruption):
    done = clone.run("train", PIP=interruption)
    assert done.returncode != 0 and not (clone.venv / ".ready").exists() and done.stdout == ""
    done = clone.run("train")
    assert done.returncode == 0 and (clone.venv / ".ready").exists()
    assert clone.events() == ["venv", "pip start", "venv", "pip start", "pip end"]


def test_two_set_ups_at_once_are_one_after_the_other(clone):
    both = [clone.start("train", PIP="sleep 0.7") for _ in range(2)]
    ends = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert clone.events() == ["venv", "pip start", "pip end"]
    assert sum("another one is running" in err for _, err in ends) == 1


def test_the_lock_is_not_held_while_a_verb_runs(clone):
    assert "the lock is free" in clone.run("train").stdout


def test_an_unfit_python_is_one_line(clone):
    done = clone.run("train", OLD_PYTHON="1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "Python 3.11 or 3.12 is needed" in done.stderr and not clone.venv.exists()


@pytest.mark.parametrize(
    ("typed", "meant"), [("swep", "sweep"), ("trian", "train"), ("doctr", "doctor"), ("bench", "benchmark")]
)
def test_an_unknown_verb_names_its_neighbour(clone, typed, meant):
    done = clone.run(typed)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"nearest: {meant} " in done.stderr
    assert not clone.venv.exists()


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["train", "--help"]])
def test_help_needs_no_set_up(clone, words):
    done = clone.run(*words)
    assert done.returncode == 0 and done.stderr == "" and not clone.venv.exists()
    for verb in ("sweep", "train", "evaluate", "benchmark", "generate", "report", "doctor", "test"):
        assert f"./launch.sh {verb}" in done.stdout


def test_the_tests_run_from_the_project(clone):
    done = clone.run("test", "-m", "not slow", "-h")
    assert done.stdout.splitlines()[:6] == [str(clone.root), "-m", "pytest", "-m", "not slow", "-h"]
