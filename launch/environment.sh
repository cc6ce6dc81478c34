# Sourced by the scripts beside it: where the repository is, and its Python environment in .venv.

REPOSITORY="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="$REPOSITORY/.venv"

# Prints the first Python that is new enough and can make environments; $PYTHON goes first.
find_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
        if [ -n "$candidate" ] && "$candidate" -c \
            'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "no Python >= 3.11 with venv found: install one (on Debian also python3-venv), or set PYTHON to it" >&2
    return 1
}

# prepare_venv FILE...: installs these pinned requirements and the package itself into .venv. Returns at once
# where that was done before and neither the pins nor the package's metadata or C source have changed since.
prepare_venv() {
    local python stamp wanted package file
    package="$(cd "$REPOSITORY" && cat pyproject.toml dist_asgd/update/kernel.c dist_asgd/update/kernel_isa.h dist_asgd/storage/snapshots.c; echo "$REPOSITORY")"
    wanted="$package$(cat "$@")"
    stamp="$VENV/installed-$(basename "${!#}")"
    if [ -x "$VENV/bin/python" ] && is_text_of "$stamp" "$wanted"; then
        return
    fi
    if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then # none yet, or one that was not finished
        python="$(find_python)"
        "$python" -m venv --clear "$VENV"
    fi
    for file in "$@"; do
        set -- "$@" -r "$file"
        shift
    done
    echo "Installing pinned packages into $VENV (torch is 200 MB; a minute or more)"
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --progress-bar on "$@"
    if ! is_text_of "$VENV/built" "$package"; then # compiling takes half a minute
        # The build tools are among the pins, so the build takes those instead of fetching others.
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e "$REPOSITORY"
        echo "$package" >"$VENV/built"
    fi
    echo "$wanted" >"$stamp"
}

# is_text_of FILE TEXT: whether FILE is there and holds TEXT.
is_text_of() {
    [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]
}
