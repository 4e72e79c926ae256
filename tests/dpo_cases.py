"""The cases of the DPO losses: options × inputs, for jaxtune, for TRL and for the frozen goldens."""

from typing import Any

import numpy as np

OF_DIFFERENCES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")
LOSSES = (*OF_DIFFERENCES, "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down")
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")
UNWEIGHTED = ("aot", "aot_unpaired", "sft")  # of sft, TRL itself fails
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beta": {"beta": 0.1},
    "ld": {"ld_alpha": 0.3},
    "ld_shared_alone": {"ld_alpha": 0.0},
    "weighted": {"use_weighting": True},
    "smoothed": {"label_smoothing": 0.2},
}
DIVERGENCES: dict[str, dict[str, Any]] = {
    "forward_kl": {"f_divergence_type": "forward_kl"},
    "js": {"f_divergence_type": "js_divergence"},
    "alpha": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    "alpha_one": {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 1.0},
}
MORE: dict[str, dict[str, Any]] = {
    "mpo": {"loss_type": ("sigmoid", "bco_pair", "sft"), "loss_weights": (0.8, 0.2, 1.0)},
    "sum": {"loss_type": ("hinge", "apo_zero"), "ld_alpha": 0.5, "use_weighting": True},
    "tau": {"loss_type": ("discopop",), "discopop_tau": 0.5},
    # 20 times a log-ratio above 4 is beyond the largest exponent; a hinge keeps the loss of the others finite.
    "clamped": {
        "loss_type": ("hinge",),
        "f_divergence_type": "alpha_divergence",
        "f_alpha_divergence_coef": 21.0,
    },
}


def cases() -> dict[str, dict]:
    """Name -> options of every case."""
    found = {}
    for loss in LOSSES:
        variants = VARIANTS | (DIVERGENCES if loss in OF_DIFFERENCES else {})
        for name, what in variants.items():
            if (name == "weighted" and loss in UNWEIGHTED) or (name == "smoothed" and loss not in SMOOTHED):
                continue
            case = {"loss_type": (loss,), "beta": 0.5, **what}
            if loss == "exo_pair":
                case = {"label_smoothing": 1e-3, **case}
            if (loss, name) == ("discopop", "forward_kl"):
                case["beta"] = 0.02  # exponentials of exponentials: at 0.5 TRL's are infinite
            found[f"{loss}-{name}"] = case
    return found | {name: {"beta": 0.5, **what} for name, what in MORE.items()}


def arrays() -> dict[str, np.ndarray]:
    """Inputs of 4 pairs: [8, 7], the chosen rows first. Row lengths differ both ways, one completion has one token."""
    draw = np.random.default_rng(0)
    shape = (8, 7)
    lengths = np.array([7, 3, 5, 1, 4, 6, 5, 2])
    starts = np.array([0, 2, 1, 3, 1, 0, 2, 0])  # the prompts' ends
    place = np.arange(7)
    mask = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])
    log_probs = -draw.gamma(1.5, 1.0, shape)
    found = {
        "log_probs": log_probs,
        "ref": log_probs + 0.7 * draw.standard_normal(shape) + 0.3 * draw.standard_normal((8, 1)),
        "log_sum_sq_probs": -draw.gamma(2.0, 0.3, shape),
        "mask": mask,
    }
    return {name: value.astype(np.float32) for name, value in found.items()}
