#!/usr/bin/env bash
# Tests with the libraries of trainers (accelerate, transformers, Lightning, torchtitan, peft), in an environment of
# their own beside .venv, which it sees. Arguments go to pytest; without any, all tests run, and the tables of scenarios
# in docs/trainers have to say what they show. With --latest the newest versions are taken instead of the pinned ones,
# and failures are only reported: they show what the next pins will need.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

latest=
[ "${1:-}" != --latest ] || { latest=-latest; shift; }
pins="$REPOSITORY/launch/requirements-integrations.txt"
prepare_venv "$REPOSITORY/launch/requirements.txt" "$REPOSITORY/launch/requirements-dev.txt"
environment="$REPOSITORY/.venv-integrations$latest"
stamp="$environment/installed"
if [ -n "$latest" ] || ! is_text_of "$stamp" "$(cat "$pins")"; then
    "$VENV/bin/python" -m venv --clear "$environment"
    site="$("$environment/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
    # As a site of its own, because the package is installed there by a .pth file.
    echo "import site; site.addsitedir('$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
        >"$site/main.pth"
    if [ -n "$latest" ]; then
        # torch stays the one that is there.
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check \
            accelerate transformers lightning peft torchtitan "torch==$("$VENV/bin/python" -c \
            'import importlib.metadata as m; print(m.version("torch").split("+")[0])')"
    else
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps -r "$pins"
        cat "$pins" >"$stamp"
    fi
fi
cd "$REPOSITORY"
[ $# -gt 0 ] || set -- -p tests.integrations.scenarios
status=0
OMP_NUM_THREADS=1 "$environment/bin/python" -m pytest tests/integrations -n 2 --dist loadfile --no-loadscope-reorder \
    "$@" || status=$?
[ -z "$latest" ] || { echo "with the newest versions: pytest's exit status is $status"; status=0; }
exit "$status"
