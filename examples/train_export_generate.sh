#!/usr/bin/env bash
# A run from one JSON, its model as a Hugging Face folder, and text from it. More arguments go to `narrowgauge train`,
# such as `--set data.train='["my/*.txt"]'`.
set -euo pipefail
examples=$(dirname "$0")
narrowgauge train "$examples/tiny.json" "$@"
narrowgauge export runs/tiny exported
python "$examples/generate.py" exported "def main("
