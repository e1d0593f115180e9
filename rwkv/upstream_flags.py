"""Flags of RWKV-LM-RLHF that have no effect here, or whose feature is absent.

Its shell scripts run unchanged: a flag without effect is named once at start, a flag that would
switch on an absent feature stops the run.
"""

from rwkv.errors import InputError

NO_EFFECT = {
    "gpu_arch": "kernels are chosen by --kernel",
    "magic_prime": "every row is read once a pass without it",
    "head_size_divisor": "it is 8 in every model file",
    "ds_bucket_mb": "buckets hold 200 million elements",
    "infctx_dataset_multiplier": "texts are packed into rows of --ctx_len",
    "sft_jsonmode": "the ending of --train_data_file says what it is",
    "sft_jsonmode_overlap_tokenshift": "pieces of a split text share one token",
    "sft_jsonmode_tokenizermode": "--tokenizer and --template choose",
    "state_output_mode": "a tuned state is written with every saved model",
    "direct_state_tuning": "--state 1 always tunes the state directly",
    "logger": "train_log.jsonl is always written",
    "enable_progress_bar": "progress is always shown",
    "data_type": "the ending of --train_data_file says what it is",
    "load_partial": "files are loaded whole",
    "my_pile_stage": "parameter groups follow the model's version",
    "my_pile_edecay": "see --lr_schedule",
    "my_exit": "the run ends after --epoch_count epochs",
    "weight_decay_final": "weight decay is constant",
    "orpo_mode": "the odds ratio is the paper's, over the answers' average log-probabilities",
    "grpo_debug": "GRPO is absent",
    "sft_kl_accesspoint": "there is no HTTP teacher",
    "sft_kl_targetmodel": "there is no HTTP teacher",
    "sft_kl_loadin4bit": "there is no HTTP teacher",
    "sft_kl_temperature": "there is no HTTP teacher",
    "sft_kl_alpha": "there is no HTTP teacher",
    "sft_kl_topk": "there is no HTTP teacher",
    "grpo_gen_count": "GRPO is absent",
    "grpo_gen_length": "GRPO is absent",
    "grpo_gen_temperature": "GRPO is absent",
    "grpo_gen_topp": "GRPO is absent",
    "grpo_kl_beta": "GRPO is absent",
    "wpo_alpha": "WPO is absent",
    "wpo_beta": "WPO is absent",
    "moe_experts": "mixtures of experts are absent",
    "moe_active": "mixtures of experts are absent",
    "moe_shared": "mixtures of experts are absent",
    "moe_balance_alpha": "mixtures of experts are absent",
    "gqa_kv_heads": "it belongs to converted Transformers",
    "rk_norm": "it belongs to converted Transformers",
    "rkv_bias": "it belongs to converted Transformers",
    "rms_norm_eps": "it belongs to converted Transformers",
}

# flag -> (values that leave the feature off, what the feature is, what to do instead)
ABSENT = {
    "moe": (("0",), "a mixture of experts", "drop it; --layer_profile with lora is near"),
    "grpo": (("0",), "GRPO", "drop it; preference objectives are --dpo and --orpo"),
    "zerocot": (("0",), "ZeroCoT", "drop it; preference objectives are --dpo and --orpo"),
    "wpo": (("0",), "WPO", "drop it; --dpo is near"),
    "sft_kl_mode": (("0",), "a teacher behind HTTP", "use --distillation with a file of scores"),
    "post_wkv_tuning": (("0",), "tuning an offset behind wkv", "use --state 1"),
    "load_cold_adapter": (("",), "a second, frozen adapter", "merge it with python -m peft.merge"),
    "load_adapter_pissa_init": (("",), "PiSSA's start values", "PiSSA adapters hold their own"),
    "head_qk": (("0",), "head QK", "drop it"),
    "dropout": (("0", "0.0"), "dropout in the model", "a layer profile has it for adapters"),
    "tiny_att_dim": (("0", "-1"), "tiny attention", "drop it"),
    "tiny_att_layer": (("0", "-1", "-999"), "tiny attention", "drop it"),
}


def split(argv: list[str]) -> tuple[list[str], list[str]]:
    """Take upstream's flags of no effect out of a command line.

    Returns:
        the words that are left, and a line for each flag taken out, in order.

    Raises:
        InputError: a flag switches on a feature that is absent.
    """
    kept: list[str] = []
    notes: list[str] = []
    position = 0
    while position < len(argv):
        word = argv[position]
        position += 1
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name not in NO_EFFECT.keys() | ABSENT.keys():
            kept.append(word)
            continue
        if not equals:
            value = ""
            if position < len(argv) and not argv[position].startswith("--"):
                value = argv[position]
                position += 1
        if name in ABSENT:
            off, feature, mend = ABSENT[name]
            if value not in off:
                raise InputError(f"--{name} {value}: {feature} is absent here; {mend}")
        else:
            notes.append(f"--{name}: no effect ({NO_EFFECT[name]})")
    return kept, notes
