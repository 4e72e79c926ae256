"""The cases of the GRPO losses and advantages: options × inputs, for jaxtune, for TRL and for the frozen goldens."""

import itertools

import numpy as np

LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "vespo", "luspo")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LEVELS = ("token", "sequence")
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
BOUNDS = {"vllm_importance_sampling_clip_max": 1.25, "vllm_importance_sampling_clip_min": 0.8}

# Of a variant: what differs from the defaults. Upper case: how the loss is called; the rest are options.
EVERYTHING = {
    "beta": 0.1,
    "delta": 1.1,
    "epsilon_high": 0.28,
    "off_policy_mask_threshold": 0.1,
    "top_entropy_quantile": 0.5,
    "vllm_importance_sampling_mode": "token_mask",
    **BOUNDS,
    "SAMPLING": True,
    "ENTROPY_COEF": 0.02,
    "ACCUMULATION": 3,
    "STEPS": 6,
}
VARIANTS = {
    "plain": {},
    "fresh": {"OLD": False},
    "kl": {"beta": 0.1},
    "kl_uncorrected": {"beta": 0.1, "use_bias_correction_kl": False},
    "off_policy": {"off_policy_mask_threshold": 0.1},
    "off_policy_sampling": {"off_policy_mask_threshold": 0.1, "SAMPLING": True, "CORRECTION": False},
    "entropy_mask": {"top_entropy_quantile": 0.3},
    "entropy_bonus": {"ENTROPY_COEF": 0.02},
    "masked_bonus": {"top_entropy_quantile": 0.3, "ENTROPY_COEF": 0.02, "ACCUMULATION": 2},
    "accumulated": {"ACCUMULATION": 3, "STEPS": 6},
    "evaluation": {"ACCUMULATION": 3, "STEPS": 6, "TRAIN": False, "ENTROPY_COEF": 0.02},
    "token_advantages": {"TOKEN_ADVANTAGES": True},
    "everything": EVERYTHING,
    **{mode: {"vllm_importance_sampling_mode": mode, **BOUNDS, "SAMPLING": True} for mode in MODES},
    "open_below": {
        "vllm_importance_sampling_mode": "token_mask",
        "vllm_importance_sampling_clip_max": 1.25,
        "SAMPLING": True,
    },
}
ONLY = {  # variants of some losses
    "delta": (CLIPPED, {"delta": 1.1}),
    "uneven": (CLIPPED, {"epsilon": 0.1, "epsilon_high": 0.28}),
    "temperatures": (("sapo",), {"sapo_temperature_neg": 2.0, "sapo_temperature_pos": 0.5}),
    "shape": (("vespo",), {"vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5, "vespo_lambda_neg": 0.0}),
    "extreme": (("vespo",), {"EXTREME": True}),
    "extreme_open": (("vespo",), {"EXTREME": True, "vespo_k_neg": 0.1, "vespo_lambda_neg": 0.0}),
}


def cases() -> dict[str, dict]:
    """Name -> the options and the way of calling of every case."""
    found = {}
    for loss, level in itertools.product(LOSSES, LEVELS):
        variants = VARIANTS | {name: what for name, (losses, what) in ONLY.items() if loss in losses}
        for name, what in variants.items():
            mode = what.get("vllm_importance_sampling_mode", "token_mask")
            if loss == "vespo" and mode.startswith("sequence"):
                continue  # refused
            case = {"loss_type": loss, "importance_sampling_level": level, "max_completion_length": 9, **what}
            if loss == "cispo":  # its epsilon_high is the bound itself
                case["epsilon_high"] = 1.1
            found[f"{loss}-{level}-{name}"] = case
    return found


def options(case: dict) -> dict:
    return {name: value for name, value in case.items() if name.islower()}


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs [6, 7]: an empty row, a row of one token, a hole, ratios on both sides of every bound, unknown samples."""
    draw = np.random.default_rng(seed)
    shape = (6, 7)
    mask = np.arange(7) < np.array([7, 5, 4, 1, 0, 7])[:, None]
    mask[0, 2:4] = False  # what a tool wrote
    shift = np.array([0.3, -0.35, 0.25, -0.3, 0.0, 0.05])[:, None]
    log_probs = -draw.gamma(1.5, 1.0, shape)
    old = log_probs - shift - 0.15 * draw.standard_normal(shape)
    sampling = old - 0.5 * shift * np.array([1, 1, -1, 1, 1, 1])[:, None] + 0.12 * draw.standard_normal(shape)
    sampling[1, 1] = sampling[5, 3] = np.nan
    # Log ratios beyond vespo's bounds: of sequences (rows 0, 1, 3), and of tokens that else would cancel out (row 2).
    far = np.array([-8.0, 9.0, 0.0, -30.0, 0.0, 0.2])[:, None] + np.zeros(shape)
    far[2, :2] = 26.0, -22.0
    found = {
        "log_probs": log_probs,
        "old": old,
        "ref": log_probs + 0.4 * draw.standard_normal(shape),
        "sampling": sampling,
        "entropies": draw.gamma(2.0, 0.7, shape),
        "mask": mask,
        "advantages": np.array([1.2, -0.7, -1.1, 0.9, 0.4, -0.5]),
        "token_advantages": draw.standard_normal(shape),
        "extreme_old": old + far,
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def reward_cases() -> dict[str, dict]:
    """Name -> rewards [N, F], weights [F], group, scale_rewards, aggregation of every case of the advantages."""
    nan = np.nan
    draw = np.random.default_rng(1)
    tables = {
        "dense": (4, draw.normal(size=(12, 2))),
        "equal": (4, np.full((8, 1), 0.5)),
        "binary": (4, (draw.random((16, 1)) < 0.5) * 1.0),
        "none_somewhere": (4, np.where(draw.random((12, 3)) < 0.3, nan, draw.normal(size=(12, 3)))),
        "row_all_none": (4, np.array([[1, 2], [nan, nan], [0, nan], [3, 1]] * 2 + [[nan, nan]] * 4)),
        "one_in_group": (3, np.array([[1.0], [nan], [nan], [2.0], [1.0], [0.0]])),
        "all_none": (2, np.full((4, 2), nan)),
        "pairs": (2, draw.normal(size=(8, 2))),
        "single_generation": (1, draw.normal(size=(4, 2))),
        "single_row": (1, draw.normal(size=(1, 2))),
    }
    found = {}
    for name, (group, rewards) in tables.items():
        weights = np.array([1.0, 0.3, -2.0][: rewards.shape[1]], np.float32)
        ways = [(scale, "sum_then_normalize") for scale in ("group", "batch", "none")]
        for scale, aggregation in [*ways, ("group", "normalize_then_sum")]:
            found[f"{name}-{scale}-{aggregation}"] = {
                "rewards": rewards.astype(np.float32),
                "weights": weights,
                "group": group,
                "scale_rewards": scale,
                "aggregation": aggregation,
            }
    return found
