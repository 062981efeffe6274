#!/bin/sh
# Resolve and pin the newest versions: constraints/refresh.sh TRANSFORMERLENS_VERSION
#
# `make constraints` calls it for each version, with PYTHON and TORCH set.
set -eu
version=$1
pins=constraints/tl-$version.txt
set -- "transformer-lens==$version"
# TransformerLens 2 requires numpy<2, with which pyarrow 26 does not import; no package declares this.
case $version in 2.*) set -- "$@" "pyarrow<26" ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo "$pins: resolving"
constraints/venv.sh "$folder"
"$folder/bin/python" -m pip install -qq "$@" -e ".[dev]"
{
    echo "# All versions used by the checks on TransformerLens $version; the package itself has open requirements."
    echo "# Written by \`make constraints\` ($("$folder/bin/python" --version)): a fresh environment, torch, then"
    echo "#     pip install$(printf ' "%s"' "$@") -e \".[dev]\""
    echo "#     pip freeze --exclude-editable"
    # +cpu is a build, not a version: the pin applies to every build. TransformerLens 2 requires these old
    # numpy and pandas only before Python 3.12, and later Pythons have no wheels for them.
    "$folder/bin/python" -m pip freeze --exclude-editable | sed -E \
        -e 's/^(torch==[^+]*)\+.*/\1/' \
        -e '/^(numpy==1|pandas==2\.0)\./s/$/; python_version < "3.12"/'
} > "$folder/pins.txt"
cp "$folder/pins.txt" "$pins"
