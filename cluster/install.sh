#!/bin/sh
# Installs what every node of a cluster needs into a Python 3.11 environment, at the pinned versions:
#     sh cluster/install.sh PYTHON
# The image and `make` both call it, so that what is tested here is what a node gets.
set -eu
cd "$(dirname "$0")/.."
"$1" -m pip install --quiet -r requirements.txt -c constraints.txt
