"""Flags of the objectives over chosen and rejected answers."""

from dataclasses import dataclass

from rwkv.flags import flag


@dataclass(frozen=True)
class DPOFlags:
    """Direct preference optimization"""

    dpo: bool = flag(False, "train on chosen and rejected answers against a reference model")
    dpo_beta: float = flag(
        0.1,
        "pull to the reference: 0.1 to 0.5 in the paper, 2 to 10 for length-normalized; scores are "
        "sums over an answer's tokens, so RWKV-LM-RLHF's 0.01 is weaker here than there",
        within="(0, inf)",
    )
    dpo_alpha: float = flag(
        0.0, "weight of the chosen answers' cross-entropy beside it", within="[0, inf)"
    )
    dpo_loss: str = flag(
        "sigmoid",
        "how a pair's margin becomes a loss",
        choices=("sigmoid", "ipo", "hinge", "robust", "cdpo", "length-normalized"),
    )
    dpo_label_smoothing: float = flag(
        0.1,
        "share of pairs taken to be labelled wrongly, for robust and cdpo; 0 to below 0.5",
        within="[0, 0.5)",
    )


@dataclass(frozen=True)
class ORPOFlags:
    """Odds ratio preference optimization"""

    orpo: bool = flag(
        False, "train on chosen answers, and on their odds over the rejected; needs no reference"
    )
    orpo_alpha: float = flag(
        0.1, "weight of the odds ratio beside the cross-entropy of 1", within="[0, inf)"
    )


@dataclass(frozen=True)
class SimPOFlags:
    """Simple preference optimization"""

    simpo: bool = flag(False, "train on chosen and rejected answers; needs no reference")
    simpo_beta: float = flag(
        2.0, "scale of the average log-probabilities; 2 to 2.5 in the paper", within="(0, inf)"
    )
    simpo_gamma: float = flag(
        1.0, "margin asked for; 0.3 to 0.5 times simpo_beta in the paper", within="[0, inf)"
    )
    simpo_alpha: float = flag(
        0.0, "weight of the chosen answers' cross-entropy beside it", within="[0, inf)"
    )


@dataclass(frozen=True)
class KTOFlags:
    """Kahneman-Tversky optimization"""

    kto: bool = flag(False, "train on answers that are good or bad, alone or in pairs")
    kto_beta: float = flag(0.1, "pull to the reference model", within="(0, inf)")
    kto_desirable: float = flag(1.0, "weight of the good answers", within="[0, inf)")
    kto_undesirable: float = flag(1.0, "weight of the bad answers", within="[0, inf)")
    kto_alpha: float = flag(
        0.0, "weight of the good answers' cross-entropy beside it", within="[0, inf)"
    )


PREFERENCE_FLAGS = (DPOFlags, ORPOFlags, SimPOFlags, KTOFlags)
PREFERENCES = ("dpo", "orpo", "simpo", "kto")
REFERENCED = ("dpo", "kto")  # objectives that compare with a reference model
