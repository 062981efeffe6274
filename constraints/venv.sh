#!/bin/sh
# Create a virtual environment with torch: PYTHON=... TORCH=... constraints/venv.sh FOLDER
#
# torch is installed first, so that later packages do not pull in another build.
set -eu
folder=$1

if ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "the pinned environments need Python 3.11 or newer, and $PYTHON is" \
        "$("$PYTHON" --version 2>&1); select another one: make PYTHON=python3.12 ..." >&2
    exit 1
fi
"$PYTHON" -m venv --clear "$folder"
pip="$folder/bin/python -m pip install -qq"
case $TORCH in
    *+cpu)
        # From pip's configured index if available, otherwise from PyTorch's index of CPU builds.
        $pip "$TORCH" 2>/dev/null ||
            $pip --extra-index-url https://download.pytorch.org/whl/cpu "$TORCH"
        ;;
    *) $pip "$TORCH" ;;
esac
