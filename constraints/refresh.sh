#!/bin/sh
# Resolve the newest versions anew and pin them all: constraints/refresh.sh TRANSFORMERLENS_VERSION
#
# `make constraints` calls it for each version, with PYTHON and TORCH set.
set -eu
version=$1
pins=constraints/tl-$version.txt
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

echo "$pins: resolving"
constraints/venv.sh "$folder"
"$folder/bin/python" -m pip install -qq "transformer-lens==$version" -e ".[dev]"
{
    echo "# Everything that the checks run with on TransformerLens $version; the package itself stays open."
    echo "# Made by \`make constraints\` ($("$folder/bin/python" --version)): a fresh environment, torch, then"
    echo "#     pip install transformer-lens==$version -e \".[dev]\""
    echo "#     pip freeze --exclude-editable"
    # +cpu is a build, not a version: the pin fits every build.
    "$folder/bin/python" -m pip freeze --exclude-editable | sed -E 's/^(torch==[^+]*)\+.*/\1/'
} > "$folder/pins.txt"
cp "$folder/pins.txt" "$pins"
