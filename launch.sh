#!/usr/bin/env bash
# One command from a fresh clone to a finished study: sets the environment up when it is missing or out of date, then runs a verb.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
verbs=(sweep train evaluate benchmark generate report doctor test)

usage() {
    cat <<'EOF'
usage: ./launch.sh [VERB [SETTING=VALUE ...]]
       without arguments: set up, then run the demo study (sweep experiment=demo)

  sweep      a study: base models, trials, evaluation, benchmark, report
               ./launch.sh sweep experiment=demo pruning.sparsity=0.5,0.9
               ./launch.sh sweep experiment=policies (every way to prune, on small models)
  train      one trial
               ./launch.sh train model=tiny pruning=learned pruning.sparsity=0.8
  evaluate   held-out perplexity of a trained model
               ./launch.sh evaluate checkpoint=FOLDER evaluate.tokens=65536
  benchmark  decoding speed and memory, pruned against dense
               ./launch.sh benchmark checkpoint=FOLDER benchmark.batch=32
               ./launch.sh benchmark target=kernels (one attention layer beside its peers)
               ./launch.sh benchmark target=generation (whole models beside transformers)
               ./launch.sh benchmark target=feedback checkpoint=FOLDER (alarm and lossless mode)
               ./launch.sh benchmark target=hidden hidden.train_file=FILE (classifying long texts)
               ./launch.sh benchmark target=gradients model=local model.path=FOLDER (gradients beside leaving keys out)
               ./launch.sh benchmark target=cascade (few keys first, with a stated risk)
  generate   continue a prompt
               ./launch.sh generate checkpoint=FOLDER generate.prompt='def main('
  report     table and plots of a sweep
               ./launch.sh report sweep=demo format=json
  doctor     what runs on this machine, and what does not
               ./launch.sh doctor
  test       the tests; what follows goes to pytest
               ./launch.sh test -m 'not slow'

A pretrained model of yours: ./launch.sh sweep experiment=retrofit model.path=FOLDER data.path=FILE_OR_FOLDER
Every setting, with its unit: pipelines/config.py; ready-made choices: conf/
EOF
}

fail() { # one line, exit 2
    printf 'ctxprune: %s\n' "$1" >&2
    exit 2
}

say() { printf '%s\n' "$1" >&2; }

# What the environment is made of: another pin, Python or place asks for another set-up.
fingerprint() {
    { printf '%s\n' "$venv"; grep '^version' "$venv/pyvenv.cfg"; cat "$root/constraints.txt" "$root/pyproject.toml"; } \
        2>/dev/null | { sha256sum 2>/dev/null || shasum -a 256; } | cut -d' ' -f1
}

ready() { [ -x "$venv/bin/python" ] && [ -f "$venv/.ready" ] && [ "$(cat "$venv/.ready")" = "$(fingerprint)" ]; }

find_python() {
    local candidate seen=""
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import venv, ensurepip' 2>/dev/null ||
                fail "$candidate cannot make virtual environments: install its venv package (Debian, Ubuntu: apt install python3-venv)"
            printf '%s\n' "$candidate"
            return
        fi
        seen+=" $("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null || true)"
    done
    fail "Python 3.11 or 3.12 is needed (found:${seen:- none}); install one, or name it: PYTHON=/path/to/python3.12 ./launch.sh"
}

install() {
    local python requirements
    # A marker that outlives an interruption: half-installed packages are not mended, they are replaced.
    if [ -e "$venv/.incomplete" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
        python=$(find_python)
        say "set-up: virtual environment in $venv with $("$python" --version)"
        mkdir -p "$venv" && touch "$venv/.incomplete"
        "$python" -m venv --clear "$venv" >&2 || fail "the virtual environment could not be made in $venv (see above)"
    fi
    touch "$venv/.incomplete"
    rm -f "$venv/.ready"
    requirements=$("$venv/bin/python" - "$root/pyproject.toml" <<'EOF'
import sys, tomllib
project = tomllib.load(open(sys.argv[1], "rb"))["project"]
print("\n".join(project["dependencies"] + sum(project["optional-dependencies"].values(), [])))
EOF
    )
    say "set-up: installing the pinned packages (about 2 minutes and 2 GB, once)"
    mapfile -t requirements <<<"$requirements"
    # DeepSpeed is a source package: DS_BUILD_OPS=0 keeps it from compiling CUDA code.
    DS_BUILD_OPS=0 "$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
        -c "$root/constraints.txt" "${requirements[@]}" >&2 || fail "the packages could not be installed (see above); the same command tries again"
    fingerprint >"$venv/.ready.new"
    rm -f "$venv/.incomplete"
    mv "$venv/.ready.new" "$venv/.ready"
    say "set-up: done in $SECONDS s"
}

set_up() {
    ready && return
    # Two terminals may start at once: the second waits, then finds everything done.
    if command -v flock >/dev/null; then
        exec 9>"$venv.lock" || fail "$root is not writable: copy the project to a folder of yours"
        flock -n 9 || { say "set-up: another one is running, waiting for it"; flock 9; }
    fi
    ready || install
    exec 9>&-
}

environment() {
    umask 077
    export PYTHONPATH=$root
    export TORCH_EXTENSIONS_DIR=$venv/torch_extensions TRITON_CACHE_DIR=$venv/triton
    export TOKENIZERS_PARALLELISM=false WANDB_SILENT=true HF_HUB_DISABLE_TELEMETRY=1
    export RAY_AUTH_MODE=token RAY_TRAIN_HEALTH_CHECK_INTERVAL_S=0.2 RAY_TRAIN_ENABLE_PRINT_PATCH=0
    unset HYDRA_FULL_ERROR PYTHONHOME
    # Only where there is no CUDA: elsewhere DeepSpeed finds the GPU by itself.
    if [ ! -e /dev/nvidiactl ]; then export DS_ACCELERATOR=cpu; fi
}

[ $# -gt 0 ] || set -- sweep experiment=demo
verb=$1
shift
case " -h --help help " in *" $verb "*) usage; exit 0 ;; esac
case " ${verbs[*]} " in
*" $verb "*) ;;
*)
    # Letters in common, longest beginning first: good enough to name a neighbour without Python.
    best="" best_score=-1
    for known in "${verbs[@]}"; do
        score=0
        for ((i = 0; i < ${#verb}; i++)); do
            [ "${verb:i:1}" = "${known:i:1}" ] && score=$((score + 2))
            [[ $known == *"${verb:i:1}"* ]] && score=$((score + 1))
        done
        score=$((score * 10 - (${#known} > ${#verb} ? ${#known} - ${#verb} : ${#verb} - ${#known})))
        if [ "$score" -gt "$best_score" ] || [ -z "$best" ]; then best=$known best_score=$score; fi
    done
    fail "no verb '$(printf '%s' "$verb" | tr -cd '[:print:]' | cut -c1-60)'; nearest: $best (./launch.sh --help lists them)"
    ;;
esac
if [ "$verb" != test ]; then
    for word in "$@"; do case $word in -h | --help) usage; exit 0 ;; esac; done
fi

set_up
environment
if [ "$verb" = test ]; then
    cd "$root"
    exec "$venv/bin/python" -m pytest "$@"
fi
# -P keeps the caller's folder out of the import path: a queue.py lying there must not replace Python's own.
exec "$venv/bin/python" -P -m pipelines "$verb" "$@"
