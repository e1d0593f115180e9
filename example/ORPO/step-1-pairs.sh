#!/usr/bin/env bash
# Step 1 of example/ORPO: look at the pairs of step 0 and tokenize them. ORPO needs no reference.
# Arguments go to data.make_pairs.
set -euo pipefail
cd "$(dirname "$0")/../.."
source example/environment.sh requirements.txt
out="${OUT:-out/orpo-example}"

"$PYTHON" -m data.doctor "$out/train.jsonl" || true  # what it finds is printed
for part in train val; do
  rm -rf "$out/$part.tok"
  "$PYTHON" -m data.make_pairs --input "$out/$part.jsonl" --output "$out/$part.tok" \
    --tokenizer bytes "$@"
done
