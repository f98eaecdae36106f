#!/usr/bin/env bash
# The package itself, into the environment that was just made. Run by Snakemake in the working directory: the checkout, or set the variable.
set -euo pipefail
python -m pip install --quiet --no-deps "${STAGEBENCH_SOURCE:-.}"
