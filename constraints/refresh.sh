#!/bin/sh
# Resolve the newest versions anew and pin them all: constraints/refresh.sh TRANSFORMERLENS_VERSION
#
# `make constraints` calls it for each version, with PYTHON and TORCH set.
set -eu
version=$1
pins=constraints/tl-$version.txt
set -- "transformer-lens==$version"
# TransformerLens 2 keeps numpy below 2; pyarrow 26 does not import then, and nothing declares it.
case $version in 2.*) set -- "$@" "pyarrow<26" ;; esac
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo "$pins: resolving"
constraints/venv.sh "$folder"
"$folder/bin/python" -m pip install -qq "$@" -e ".[dev]"
{
    echo "# Everything that the checks run with on TransformerLens $version; the package itself stays open."
    echo "# Made by \`make constraints\` ($("$folder/bin/python" --version)): a fresh environment, torch, then"
    echo "#     pip install$(printf ' "%s"' "$@") -e \".[dev]\""
    echo "#     pip freeze --exclude-editable"
    # +cpu is a build, not a version: the pin fits every build. TransformerLens 2 wants these old
    # numpy and pandas before Python 3.12 only, and later Pythons have no wheels of them.
    "$folder/bin/python" -m pip freeze --exclude-editable | sed -E \
        -e 's/^(torch==[^+]*)\+.*/\1/' \
        -e '/^(numpy==1|pandas==2\.0)\./s/$/; python_version < "3.12"/'
} > "$folder/pins.txt"
cp "$folder/pins.txt" "$pins"
