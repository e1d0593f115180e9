#!/usr/bin/env bash
# Step 1 of example/DPO: look at the pairs of step 0, and score them under the model to be trained.
# A profile that trains more than adapters needs the scores. Arguments go to data.make_reference.
set -euo pipefail
cd "$(dirname "$0")/../.."
source example/environment.sh requirements.txt
model="${MODEL:-example/Quickstart/base.pth}"
out="${OUT:-out/dpo-example}"

"$PYTHON" -m data.doctor "$out/train.jsonl" || true  # what it finds is printed
"$PYTHON" -m data.make_reference --data "$out/train.jsonl,$out/val.jsonl" --load_model "$model" \
  --cache_dir "$out/cache" "$@"
