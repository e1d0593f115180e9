#!/usr/bin/env bash
# Step 0 of example/ORPO: prompts with good answers, and rejected answers that the model writes.
# Writes out/orpo-example/train.jsonl and val.jsonl. Arguments go to example/Quickstart/make_data.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
source example/environment.sh requirements.txt
model="${MODEL:-example/Quickstart/base.pth}"
out="${OUT:-out/orpo-example}"
rm -rf "$out"

"$PYTHON" example/Quickstart/make_data.py --output "$out/answers" --rows 400 --held_out 40 "$@"
for part in train val; do
  "$PYTHON" -m data.make_rejected --input "$out/answers/$part.jsonl" --output "$out/$part.jsonl" \
    --load_model "$model" --tokens 80 --batch_size 64 --temperature 1 --top_p 0.9
done
