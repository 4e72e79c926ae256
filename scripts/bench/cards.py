"""GPUs that programs are compiled for on a machine without one (--compile_for): what XLA asks of them.

Figures are those of the makers' data sheets and of NVIDIA's CUDA programming guide (limits by compute capability).
"""

import os
from typing import Any, NamedTuple


class Card(NamedTuple):
    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    memory: float  # bytes
    bandwidth: float  # bytes/s
    l2: int  # MiB
    shared: int  # KiB of a core
    threads: int  # of a core at most
    lanes: int = 128  # float32 units of a core
    clock: float = 1.98  # GHz


CARDS = {
    "t4": Card("Tesla T4", (7, 5), 40, 15.8e9, 320e9, 4, 64, 1024, 64, 1.59),
    "a100": Card("NVIDIA A100-SXM4-40GB", (8, 0), 108, 42.4e9, 1555e9, 40, 164, 2048, 64, 1.41),
    "rtx3090": Card("NVIDIA GeForce RTX 3090", (8, 6), 82, 25.3e9, 936e9, 6, 100, 1536, 128, 1.7),
    "l4": Card("NVIDIA L4", (8, 9), 58, 23.6e9, 300e9, 48, 100, 1536, 128, 2.04),
    "rtx4090": Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 25.3e9, 1008e9, 72, 100, 1536, 128, 2.52),
    "h200": Card("NVIDIA H200", (9, 0), 132, 150e9, 4.8e12, 60, 228, 2048),
    "rtx5090": Card("NVIDIA GeForce RTX 5090", (12, 0), 170, 33.7e9, 1792e9, 96, 100, 1536, 128, 2.41),
}


def target_config(card: Card) -> str:
    """XLA's GpuTargetConfigProto, as text."""
    major, minor = card.capability
    usable = card.shared - (1 if major >= 8 else 0)  # by one block; the system takes 1 KiB
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared << 10} shared_memory_per_block_optin: {usable << 10}
  threads_per_core_limit: {card.threads} core_count: {card.cores} fpus_per_core: {card.lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {card.bandwidth:.0f} l2_cache_size: {card.l2 << 20} clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory:.0f} cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }} runtime_version {{ major: 13 }}
device_description_str: "{card.name}"
"""


def compile_only(card: Card, count: int = 1) -> list[Any]:
    """JAX devices of `count` such cards, which only compile; called before anything has asked JAX for a device."""
    os.environ |= {
        "CUDA_VISIBLE_DEVICES": "-1",
        "JAX_PLATFORMS": "cpu",  # on a machine with GPUs too
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAXTUNE_COMPILE_CACHE": "0",
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")
        + " --xla_gpu_autotune_level=0",  # nothing can be tried out
    }
    from jax.experimental import topologies

    description = topologies.get_topology_desc(
        platform="cuda", target_config=target_config(card), topology=f"1x1x{count}"
    )
    return description.devices
