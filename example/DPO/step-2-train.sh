#!/usr/bin/env bash
# Step 2 of example/DPO: train on the pairs and scores of steps 0 and 1. Arguments go to train.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
source example/environment.sh requirements.txt
model="${MODEL:-example/Quickstart/base.pth}"
out="${OUT:-out/dpo-example}"

"$PYTHON" train.py --dpo 1 --dpo_beta 0.1 --dpo_alpha 0.1 --load_model "$model" \
  --rlhf_train_file "$out/train.jsonl" --val_data_file "$out/val.jsonl" \
  --layer_profile example/Quickstart/profile.json --ctx_len 512 --micro_bsz 1 --grad_cp 0 \
  --lr_init 1e-3 --lr_final 1e-4 --warmup_steps 5 --epoch_count 2 \
  --proj_dir "$out/run" --cache_dir "$out/cache" "$@"
"$PYTHON" -m peft.merge --base "$model" --adapter "$out/run/rwkv-1.pth" --output "$out/merged.pth"
