"""TRL's own code for DPO's losses, run on the cases of dpo_cases."""

import contextlib
import types
from collections import defaultdict
from unittest import mock

import dpo_cases
import numpy as np
import torch
from trl.trainer.dpo_trainer import DPOTrainer

TRL = "1.16.0"
LOGGED = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class _Model:
    """Gives the outputs that it was made of."""

    training = True
    is_gradient_checkpointing = False

    def __init__(self, **outputs):
        self.outputs = types.SimpleNamespace(**outputs)

    def __call__(self, **_):
        return self.outputs


def _trainer(case: dict, model: _Model, reference: _Model):
    get = case.get
    same = lambda x: x  # noqa: E731
    return types.SimpleNamespace(
        model=model,
        ref_model=reference,
        args=types.SimpleNamespace(
            gradient_checkpointing_kwargs=None, discopop_tau=get("discopop_tau", 0.05)
        ),
        accelerator=types.SimpleNamespace(
            device="cpu", gather=same, gather_for_metrics=same, autocast=contextlib.nullcontext
        ),
        precompute_ref_logps=True,
        loss_types=list(case["loss_type"]),
        loss_weights=list(get("loss_weights") or [1.0] * len(case["loss_type"])),
        beta=case["beta"],
        label_smoothing=get("label_smoothing", 0.0),
        ld_alpha=get("ld_alpha"),
        f_divergence_type=get("f_divergence_type", "reverse_kl"),
        f_alpha_divergence_coef=get("f_alpha_divergence_coef", 0.5),
        use_weighting=get("use_weighting", False),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )


def loss(case: dict, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """TRL's loss, gradient and metrics of a case: name -> float32 array."""
    live = arrays["mask"] > 0
    clean = lambda name: torch.tensor(np.where(live, arrays[name], 0).astype(np.float32))  # noqa: E731
    log_probs = clean("log_probs").requires_grad_()
    nothing = torch.zeros(live.shape)
    model = _Model(
        log_probs=log_probs,
        log_sum_sq_probs=clean("log_sum_sq_probs"),
        entropy=nothing,
        mean_logits=nothing,
        is_top1=nothing.bool(),
    )
    me = _trainer(case, model, _Model(log_probs=clean("ref")))
    # TRL's arrays begin with the first token, which nothing predicts.
    mask = torch.nn.functional.pad(torch.tensor(live).long(), (1, 0))
    inputs = {"input_ids": torch.zeros_like(mask), "attention_mask": mask, "completion_mask": mask}
    chosen, rejected = DPOTrainer.compute_ref_log_probs(me, me.ref_model, inputs)
    inputs |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    # TRL weighs the hinge loss in place, which torch refuses to differentiate: relu's own result has to stay.
    kept = mock.patch.object(torch, "relu", lambda x, relu=torch.relu: relu(x).clone())
    with kept:
        value = DPOTrainer._compute_loss(me, model, inputs, return_outputs=False)
    value.backward()
    gradient = log_probs.grad * torch.tensor(live)  # elsewhere they are constants of TRL's head
    found = {"loss": value, "d_log_probs": gradient, "ref": torch.cat([chosen, rejected])}
    found |= {name: me._metrics["train"][name][0] for name in LOGGED}
    return {name: np.asarray(torch.as_tensor(x).detach(), np.float32) for name, x in found.items()}


def results() -> dict[str, np.ndarray]:
    """All cases: "input <array>", "<case> <result>" -> float32 array."""
    arrays = dpo_cases.arrays()
    found = {f"input {name}": array for name, array in arrays.items()}
    for name, case in dpo_cases.cases().items():
        found |= {f"{name} {key}": x for key, x in loss(case, arrays).items()}
    return found
