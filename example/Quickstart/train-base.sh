#!/usr/bin/env bash
# How base.pth was made: a byte-level RWKV-7 of 5.3 million parameters, from scratch with
# BlinkDL's initialization, in minutes on one GPU.
#
#   TEXT=texts.jsonl HELD_OUT=held_out.jsonl bash example/Quickstart/train-base.sh
#
# Both files have a {"text": ...} a line; make_texts.py makes them. README.md beside this says which
# texts base.pth has read. The log shows the held-out loss at every 1,000 steps and at the end.
# Writes out/quickstart-base/rwkv-<last epoch>.pth, to be copied to base.pth. Arguments go to
# train.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
source example/environment.sh requirements.txt
"$PYTHON" train.py --sft 1 --my_testing x070 --n_layer 6 --n_embd 256 --vocab_size 256 \
  --tokenizer bytes --train_data_file "${TEXT:?set TEXT to a .jsonl file of texts}" \
  --val_data_file "${HELD_OUT:?set HELD_OUT to a .jsonl file of texts}" \
  --ctx_len 512 --micro_bsz 64 --epoch_count 5 --epoch_save 100 --precision bf16 --grad_cp 0 \
  --lr_init 2e-3 --lr_final 5e-5 --lr_schedule cosine --warmup_steps 100 --weight_decay 0.1 \
  --beta2 0.95 --val_every 1000 --log_every 10 --num_workers 4 --proj_dir out/quickstart-base "$@"
