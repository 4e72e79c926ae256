"""What a layer keeps for the backward pass, by name; the rest is computed again from the layer's input.

Every name but `attention` costs a matrix product of K = D to compute again, so a byte kept saves about the same time
whichever it is; attention saves more than that as rows get longer.
"""

from dataclasses import dataclass

import jax

from jaxtune.config import KEEPABLE, remat_parts

_BLOCK_INPUT = "block_input"
_ALWAYS = ["adapter", "statistic"]
NEVER_OFFLOADED = frozenset({"gate_up"})


@dataclass(frozen=True)
class Remat:
    """A choice of what to keep beside each layer's input, and whether all that waits on the device or on the host.

    keep, per token and layer, elements: attention (its output, D, and softmax statistics), qkv (D + 2·K·h), residual
    (x + attention, D), gate_up (2·F). The few elements of x A, where products are joined, and what a norm divides by
    are kept always, on the device. offload: the rest waits in pinned host memory, but for gate_up: to send and fetch
    them would take longer than to compute them again.
    """

    keep: frozenset[str] = frozenset()
    offload: bool = False

    @classmethod
    def parse(cls, text: str) -> "Remat":
        """ "all" (recompute everything), "none" (keep everything), or names joined by "+"; see config.remat_parts."""
        return cls(*remat_parts(text))

    def __str__(self) -> str:
        words = (
            ["none"]
            if self.keep == frozenset(KEEPABLE)
            else [n for n in KEEPABLE if n in self.keep] or ["all"]
        )
        return "+".join(words + ["offload"] * self.offload)

    def policy(self):
        """For jax.checkpoint."""
        if not self.offload:
            return jax.checkpoint_policies.save_only_these_names(*_ALWAYS, *sorted(self.keep))
        return jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[*_ALWAYS, *sorted(self.keep & NEVER_OFFLOADED)],
            names_which_can_be_offloaded=[_BLOCK_INPUT, *sorted(self.keep - NEVER_OFFLOADED)],
            offload_src="device",
            offload_dst="pinned_host",
        )
