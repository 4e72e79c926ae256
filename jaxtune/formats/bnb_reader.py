"""Read a bitsandbytes 4-bit checkpoint folder: the packed bytes of a weight with the tensors beside it.

Beside a quantised "….q_proj.weight" (uint8) lie "….q_proj.weight.absmax", ".quant_map", for double
quantisation ".nested_absmax" and ".nested_quant_map", and ".quant_state.bitsandbytes__nf4" (JSON in uint8).
A module that `llm_int8_skip_modules` left in 16 bits has none of these and is read as a plain tensor.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxtune.formats.safetensors_reader import SafetensorsFolder, TensorInfo

_SIDES = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class BnbTensor:
    """A weight as bitsandbytes stores it.

    tensors: "weight" (packed uint8 [out*in/2, 1]), "weight.absmax", "weight.quant_map",
        "weight.quant_state.bitsandbytes__nf4" and, when double quantised, "weight.nested_absmax" and
        "weight.nested_quant_map".
    shape: [out, in] of the weight that the bytes stand for.
    """

    tensors: dict[str, np.ndarray]
    shape: tuple[int, ...]


def check_quantization_config(config: dict[str, Any] | None, where: str | Path) -> bool:
    """True when a checkpoint is bitsandbytes 4-bit, False when it is not quantised.

    Raises:
        ValueError: quantised in another way; the field and its value are named.
    """
    if not config:
        return False
    method = config.get("quant_method", "bitsandbytes" if "load_in_4bit" in config else None)
    wanted = "jaxtune loads 16-bit, bitsandbytes 4-bit (nf4) and GGUF checkpoints; use the 16-bit repository"
    if method != "bitsandbytes":
        raise ValueError(f"{where}: quantization_config.quant_method is {method!r}. {wanted}.")
    if config.get("load_in_8bit") or not config.get("load_in_4bit"):
        raise ValueError(
            f"{where}: quantization_config.load_in_4bit is not true (8-bit bitsandbytes). {wanted}."
        )
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if kind != "nf4":
        raise ValueError(f"{where}: quantization_config.bnb_4bit_quant_type is {kind!r}. {wanted}.")
    storage = config.get("bnb_4bit_quant_storage", "uint8")
    if storage != "uint8":
        raise ValueError(
            f"{where}: quantization_config.bnb_4bit_quant_storage is {storage!r}, not 'uint8'. {wanted}."
        )
    return True


class BnbFolder:
    """A bitsandbytes-4bit folder, single file or sharded; side tensors are folded into their weight.

    Raises:
        ValueError: a quantised weight lacks one of its side tensors, or a side tensor has no weight.
    """

    def __init__(self, folder: str | Path):
        self._folder = SafetensorsFolder(folder)
        self._sides: dict[str, list[str]] = {}
        plain = []
        for name in self._folder.names():
            owner = _owner(name)
            if owner is None:
                plain.append(name)
            else:
                self._sides.setdefault(owner, []).append(name)
        if orphans := sorted(set(self._sides) - set(plain)):
            raise ValueError(
                f"{folder} has quantisation tensors but not the weights of: {', '.join(orphans)}"
            )
        self._names = plain
        for name in self._sides:
            self._check(name)

    def _check(self, name: str) -> None:
        have = {side[len(name) :] for side in self._sides[name]}
        wanted = {".absmax", ".quant_map", _STATE + "nf4"}
        if any(side.startswith(".nested") for side in have):
            wanted |= {".nested_absmax", ".nested_quant_map"}
        if missing := sorted(wanted - have):
            raise ValueError(
                f"{self._folder.folder}: {name!r} is quantised but lacks {', '.join(missing)} "
                f"(there is {', '.join(sorted(have))})"
            )

    def names(self) -> list[str]:
        """Weight names without the side tensors, in file order."""
        return list(self._names)

    def info(self, name: str) -> TensorInfo:
        """Stored dtype (uint8 when quantised) and the shape [out, in] of the weight it stands for."""
        info = self._folder.info(name)
        if name not in self._sides:
            return info
        return TensorInfo(info.dtype, self._shape(name), info.start, info.end)

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(json.loads(bytes(self._folder.read(f"{name}{_STATE}nf4")))["shape"])

    def read(self, name: str) -> np.ndarray | BnbTensor:
        """A quantised weight with its side tensors, or a plain memory-mapped view for a skipped module."""
        if name not in self._sides:
            return self._folder.read(name)
        shape = self._shape(name)
        leaf = name.rsplit(".", 1)[-1]
        tensors = {leaf: self._folder.read(name)}
        tensors |= {leaf + side[len(name) :]: self._folder.read(side) for side in self._sides[name]}
        return BnbTensor(tensors, shape)


def _owner(name: str) -> str | None:
    """The weight that a side tensor belongs to, or None for a weight."""
    if _STATE in name:
        return name.split(_STATE)[0]
    return next((name.removesuffix(side) for side in _SIDES if name.endswith(side)), None)
