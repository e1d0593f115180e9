#!/usr/bin/env bash
# The main job from nothing: environment, data, fine-tuning, held-out answers, merge, chat.
# Reads base.pth; writes out/quickstart, anew each time but with --resume 1. Arguments go to train.py.
set -euo pipefail
cd "$(dirname "$0")/../.."
source example/environment.sh requirements.txt
out=out/quickstart
case " $* " in
  *" --resume "*) ;;
  *) rm -rf "$out" ;;
esac
mkdir -p "$out"

echo "1. data: three small tasks, made from a seed"
"$PYTHON" example/Quickstart/make_data.py --output "$out/data"
"$PYTHON" -m data.show "$out/data/train.jsonl" --rows 2 --tokenizer bytes --cache_dir "$out/cache"

echo "2. fine-tuning with LoRA; held-out loss and answers before and after"
"$PYTHON" train.py --sft 1 --load_model example/Quickstart/base.pth \
  --train_data_file "$out/data/train.jsonl" --val_data_file "$out/data/val.jsonl" \
  --val_prompts "$out/data/prompts.txt" --layer_profile example/Quickstart/profile.json \
  --ctx_len 512 --micro_bsz 2 --epoch_steps 120 --grad_cp 0 \
  --lr_init 3e-3 --lr_final 2e-4 --lr_schedule cosine --warmup_steps 10 \
  --proj_dir "$out/run" --cache_dir "$out/cache" "$@"

echo "3. merging the adapter into the base, and comparing both"
"$PYTHON" -m peft.merge --base example/Quickstart/base.pth --adapter "$out/run/rwkv-0.pth" \
  --output "$out/merged.pth"

echo "4. all held-out prompts, answered by the merged model"
"$PYTHON" example/check_answers.py --load_model "$out/merged.pth" --data "$out/data/val.jsonl" \
  --template world --tokens 80 --show 6 \
  --form 'Could you please .+\? Thank you!|This is the .+\. It is .+\.|I am sorry, but I will not .+\.'

echo
echo "loss curve: $out/run/loss.png"
echo "chat with it:   .venv/bin/python -m rwkv.chat --load_model $out/merged.pth"
echo "try:            Ask politely: open the blue door."
