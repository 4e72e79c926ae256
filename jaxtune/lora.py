"""LoRA adapters (arXiv 2106.09685): attaching, initialising, merging, and PEFT's names in and out."""

import json
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from jaxtune.formats.text_side import TextReader, TextSide
from jaxtune.kernels.linear import dense
from jaxtune.models.decoder import CausalLM
from jaxtune.models.layers import Embedding, Linear
from jaxtune.models.names import (
    Leaves,
    Slot,
    leaf_shapes,
    linear_slots,
    module_at,
    stored_weight,
    trainable_paths,
)

PEFT_PREFIX = "base_model.model."
SAVABLE = ("embed_tokens", "lm_head")
_LAYER = re.compile(r".*\.[^.]*\.(\d+)\.")  # PEFT's: a name's last list with a module below it
# What the parts of a model are called in the names of its modules, as Unsloth has it.
_VISION = re.compile("vision|image|visual|patch")
_ATTENTION = re.compile("attn|attention|mixer")
_MLP = re.compile("mlp|feed_forward|ffn|dense|mixer")
# Fields of PEFT's adapter_config.json that change the adapter's meaning, and the values that mean "not used".
_UNSUPPORTED = {
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "bias": ("none",),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "exclude_modules": (None, []),
    "use_qalora": (False, None),
    "alora_invocation_tokens": (None,),
    "layers_pattern": (None, [], "layers"),
    "ensure_weight_tying": (False, None),
}


@dataclass(frozen=True)
class LoraConfig:
    """An adapter, with PEFT's field names.

    r: rank. lora_alpha: the update is scaled by alpha/r (alpha/√r with use_rslora, arXiv 2312.03732).
    target_modules: leaf names ("q_proj"), full names, "all-linear" (all but the head) or a regular expression.
    init_lora_weights: True (A as PEFT's Kaiming-uniform, B zero), "gaussian" (A ~ N(0, 1/r²), B zero), False (both
    random: for tests). layers_to_transform: layer numbers, all when None. modules_to_save: "embed_tokens" and
    "lm_head" trained whole, in float32. random_state: seed of the initial weights.
    """

    r: int = 16
    lora_alpha: float = 16
    target_modules: tuple[str, ...] | str = "all-linear"
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: tuple[int, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    random_state: int = 3407

    def __post_init__(self):
        if not isinstance(self.r, int) or self.r <= 0:
            raise ValueError(f"r, the rank of the adapter, must be an integer above 0, got {self.r!r}")
        check_targets(self.target_modules)
        odd = [n for n in self.layers_to_transform or () if isinstance(n, bool) or not isinstance(n, int)]
        if odd:
            raise ValueError(
                f"layers_to_transform holds {', '.join(map(repr, odd))}; expected layers' numbers, as [0, 2]"
            )
        if not self.lora_alpha > 0:
            raise ValueError(f"lora_alpha must be above 0, got {self.lora_alpha!r}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must be in [0, 1), got {self.lora_dropout!r}")
        if self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights must be True, False or 'gaussian', got {self.init_lora_weights!r}"
            )
        if (
            isinstance(self.target_modules, str)
            and self.target_modules != "all-linear"
            and self.layers_to_transform
        ):
            raise ValueError(
                f"layers_to_transform needs target_modules by name, not the pattern {self.target_modules!r}; "
                "put the layers into the pattern"
            )
        unknown = [m for m in self.modules_to_save if m.rsplit(".", 1)[-1] not in SAVABLE]
        if unknown:
            raise ValueError(f"modules_to_save can hold {', '.join(SAVABLE)}; got {', '.join(unknown)}")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def saved(self) -> set[str]:
        """modules_to_save as leaf names."""
        return {m.rsplit(".", 1)[-1] for m in self.modules_to_save}


def check_targets(targets: Any) -> None:
    """Raises ValueError unless these are names of modules, or one text."""
    names = [targets] if isinstance(targets, str) or not isinstance(targets, Iterable) else targets
    odd = [name for name in names if not isinstance(name, str)]
    if odd:
        raise ValueError(
            f"target_modules holds {', '.join(map(repr, odd))}; expected names, as ['q_proj', 'v_proj'], 'all-linear' "
            "or a regular expression. Numbers of layers go into layers_to_transform"
        )


def target_names(model: CausalLM, config: LoraConfig) -> set[str]:
    """Checkpoint names of the linear layers that get an adapter.

    Raises:
      ValueError: a target matches nothing; the message lists what exists.
    """
    names = [n for n in linear_slots(model) if n != "lm_head"]
    wanted = config.target_modules
    if wanted == "all-linear":
        patterns: dict[str, Callable[[str], Any]] = {"all-linear": lambda name: True}
    elif isinstance(wanted, str):
        patterns = {wanted: lambda name: re.fullmatch(wanted, name)}
    else:
        patterns = {t: (lambda name, t=t: name == t or name.endswith("." + t)) for t in wanted}
    chosen: set[str] = set()
    for target, matches in patterns.items():
        found = {n for n in names if matches(n)}
        if not found:
            leaves = sorted({n.rsplit(".", 1)[-1] for n in names})
            kind = ", a regular expression for whole names," if isinstance(wanted, str) else ""
            advice = "; give such names as a list" if isinstance(wanted, str) else ""
            raise ValueError(
                f"target_modules {target!r}{kind} matches no layer of this model; it has {', '.join(leaves)}{advice}"
            )
        chosen |= found
    if config.layers_to_transform is None:
        return chosen
    layers = {int(m[1]) for n in names if (m := _LAYER.match(n))}
    absent = sorted(set(config.layers_to_transform) - layers)
    if absent:
        raise ValueError(f"layers_to_transform names layers {absent}; the model has 0 to {max(layers)}")
    return {n for n in chosen if (m := _LAYER.match(n)) and int(m[1]) in config.layers_to_transform}


def parts_of(
    model: CausalLM,
    targets: tuple[str, ...] | str | None,
    *,
    vision: bool,
    language: bool,
    attention: bool,
    mlp: bool,
) -> str:
    """The target_modules, as a regular expression, that are in the given parts of a model.

    Without `targets` those are the linear layers of attention and MLPs whose kind occurs more than once: neither the
    head nor what stands between tower and decoder.

    Raises:
      ValueError: nothing is left.
    """
    names = target_names(model, LoraConfig(target_modules="all-linear" if targets is None else targets))
    counts = Counter(name.rsplit(".", 1)[-1] for name in linear_slots(model))

    def is_wanted(name: str) -> bool:
        where, leaf = name.rsplit(".", 1)
        seen = language if where.startswith(f"{model.decoder_path}.") else vision and _VISION.search(where)
        kind = (attention and _ATTENTION.search(where)) or (mlp and _MLP.search(where))
        return bool(seen and kind) and (targets is not None or counts[leaf] > 1)

    kinds = {re.sub(r"\\\.\d+\\\.", r"\\.\\d+\\.", re.escape(name)) for name in names if is_wanted(name)}
    if not kinds:
        raise ValueError(
            f"nothing to train: target_modules={targets!r} with vision={vision}, language={language}, "
            f"attention={attention}, mlp={mlp} (finetune_…) leaves no layer of this model"
        )
    return "|".join(sorted(kinds))


def chosen_targets(
    model: CausalLM, targets: tuple[str, ...] | str | None, *, sees: bool, **parts: bool
) -> tuple[str, ...] | str:
    """What get_peft_model's target_modules and finetune_… arguments ask for, as LoraConfig's target_modules.

    Args:
      targets: None: the linear layers of attention and MLPs; "all-linear" means the same, in every part.
      sees: the model has a tower. parts: see `parts_of`.
    """
    if targets is not None and not sees and parts["language"] and parts["attention"] and parts["mlp"]:
        return targets
    if targets == "all-linear":
        targets, parts = None, dict.fromkeys(parts, True)
    return parts_of(model, targets, **parts)


def named(model: CausalLM, config: LoraConfig) -> LoraConfig:
    """The same adapter with "all-linear" spelt out, as PEFT does before it saves."""
    if config.target_modules != "all-linear":
        return config
    leaves = {name.rsplit(".", 1)[-1] for name in linear_slots(model)} - {"lm_head"}
    return replace(config, target_modules=tuple(sorted(leaves)))


def attach(model: CausalLM, config: LoraConfig) -> set[str]:
    """Adds the adapter's variables (shapes) to a model of shapes, in place; returns the adapted module names."""
    slots = linear_slots(model)
    names = target_names(model, config)
    for path in {slots[n].path for n in names}:
        module_at(model, path).add_lora(path, config.r, config.lora_dropout, config.use_dora)
    if config.saved() and model.lm_head is None:  # tied: as in PEFT, the head becomes a weight of its own
        model.lm_head = Linear(
            model.config.hidden_size, model.config.vocab_size, bias=False, dtype=model.dtype
        )
    if "embed_tokens" in config.saved():
        _train_whole(model.decoder.embed_tokens)
    if "lm_head" in config.saved() and model.lm_head is not None:
        _train_whole(model.lm_head)
    return names


def _train_whole(module: Linear | Embedding) -> None:
    module.weight = nnx.Param(jax.ShapeDtypeStruct(module.weight.get_value().shape, jnp.float32))


def train_everything(model: CausalLM) -> None:
    """Full fine-tuning: every weight of a model of shapes becomes a trained float32 leaf, in place."""
    for _, module in nnx.iter_modules(model):
        for leaf in ("weight", "bias"):
            variable = getattr(module, leaf, None)
            if isinstance(variable, nnx.Variable):
                setattr(
                    module, leaf, nnx.Param(jax.ShapeDtypeStruct(variable.get_value().shape, jnp.float32))
                )


def _initial(path: str, shape: tuple[int, ...], config: LoraConfig) -> jax.Array:
    """First value of one A ([.., in, r]) or B ([.., r, out]); the key depends on the path alone."""
    key = jax.random.fold_in(jax.random.key(config.random_state), zlib.crc32(path.encode()))
    is_a = path.endswith("lora_A")
    if not is_a and config.init_lora_weights is not False:
        return jnp.zeros(shape, jnp.float32)
    if config.init_lora_weights == "gaussian":
        return jax.random.normal(key, shape, jnp.float32) / config.r
    bound = 1 / math.sqrt(shape[-2])  # Kaiming-uniform with a = √5: fan-in is the second last axis of both
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _magnitudes(model: CausalLM, base: Leaves, path: str, shape: tuple[int, ...]) -> jax.Array:
    layers = [None] if len(shape) == 1 else range(shape[0])
    weights = (stored_weight(model, base, Slot(path, i)) for i in layers)
    norms = [jnp.linalg.norm(dense(w, jnp.float32), axis=1) for w in weights]
    return norms[0] if len(shape) == 1 else jnp.stack(norms)


def initialise(model: CausalLM, base: Leaves, config: LoraConfig, names: set[str]) -> tuple[Leaves, Leaves]:
    """Leaves of a freshly attached adapter, and the base without what is now trained whole.

    Returns:
      (trainable: lora_A, lora_B, lora_magnitude and full weights, float32; base with lora_scaling added).
    """
    shapes, base = leaf_shapes(model), dict(base)
    # A head that `attach` untied starts as the embedding.
    if model.lm_head is not None and "lm_head.weight" not in base:
        base["lm_head.weight"] = base[f"{model.decoder_path}.embed_tokens.weight"]
    trainable: Leaves = {}
    for path in sorted(trainable_paths(model)):
        module_path, leaf = path.rsplit(".", 1)
        if leaf in ("lora_A", "lora_B"):
            trainable[path] = _initial(path, shapes[path].shape, config)
        elif leaf == "lora_magnitude":
            trainable[path] = _magnitudes(model, base, module_path, shapes[path].shape)
        else:
            trainable[path] = jnp.asarray(base[path], jnp.float32)
    base = {path: leaf for path, leaf in base.items() if path not in trainable}
    scaling = {p: np.zeros(shapes[p].shape, np.float32) for p in shapes if p.endswith(".lora_scaling")}
    for name, slot in linear_slots(model).items():
        if name in names:
            scaling[f"{slot.path}.lora_scaling"][() if slot.index is None else slot.index] = config.scaling
    return trainable, base | {path: jnp.asarray(value) for path, value in scaling.items()}


def _adapted(model) -> dict[str, Slot]:
    """Name -> slot of the modules whose adapter is in use."""
    scaling = {path: np.asarray(leaf) for path, leaf in model.base.items() if path.endswith(".lora_scaling")}
    return {
        name: slot
        for name, slot in model.slots.items()
        if f"{slot.path}.lora_scaling" in scaling and slot.take(scaling, "lora_scaling") != 0
    }


def _peft_leaf(leaf: str) -> str:
    return "lora_magnitude_vector" if leaf == "lora_magnitude" else f"{leaf}.weight"


def adapter_tensors(model) -> dict[str, np.ndarray]:
    """The trained leaves of a `jaxtune.model.Model` under PEFT's names, float32, A as [r, in], B as [out, r]."""
    tensors, trainable = {}, {path: np.asarray(leaf) for path, leaf in model.trainable.items()}
    for name, slot in _adapted(model).items():
        for leaf in ("lora_A", "lora_B", "lora_magnitude"):
            if f"{slot.path}.{leaf}" in trainable:
                value = slot.take(trainable, leaf)
                tensors[f"{PEFT_PREFIX}{name}.{_peft_leaf(leaf)}"] = np.ascontiguousarray(value.T)
    for path in (f"{model.module.decoder_path}.embed_tokens.weight", "lm_head.weight"):
        if path in trainable:
            tensors[f"{PEFT_PREFIX}{path}"] = trainable[path]
    return tensors


def adapter_leaves(model, tensors: Mapping[str, np.ndarray]) -> Leaves:
    """The inverse of `adapter_tensors`: the trainable leaves of `model`, filled from PEFT's tensors.

    Raises:
      ValueError: tensors are missing, unused, or of another shape.
    """
    want = {}
    for name, slot in _adapted(model).items():
        for leaf in ("lora_A", "lora_B", "lora_magnitude"):
            if f"{slot.path}.{leaf}" in model.trainable:
                want[f"{PEFT_PREFIX}{name}.{_peft_leaf(leaf)}"] = (f"{slot.path}.{leaf}", slot.index)
    for path in (f"{model.module.decoder_path}.embed_tokens.weight", "lm_head.weight"):
        if path in model.trainable:
            want[f"{PEFT_PREFIX}{path}"] = (path, None)
    missing, unused = sorted(want.keys() - tensors.keys()), sorted(tensors.keys() - want.keys())
    if missing or unused:
        raise ValueError(f"the adapter does not fit the model; missing: {missing[:4]}, unused: {unused[:4]}")
    leaves = {path: np.array(value) for path, value in model.trainable.items()}
    for name, (path, index) in want.items():
        value = (
            np.asarray(tensors[name], np.float32).T
            if ".lora_" in path
            else np.asarray(tensors[name], np.float32)
        )
        where = leaves[path][...] if index is None else leaves[path][index]
        if where.shape != value.shape:
            raise ValueError(f"{name}: expected shape {list(where.T.shape)}, got {list(tensors[name].shape)}")
        where[...] = value
    return {path: jnp.asarray(value) for path, value in leaves.items()}


def merged_weight(model, name: str, weight: np.ndarray | jax.Array) -> Any:
    """W + s·(A B)ᵀ of one module of a `jaxtune.model.Model`, DoRA's magnitude folded in.

    Args:
      name: checkpoint module name.
      weight: float32 [out, in], the base to merge onto: of NumPy, or of JAX to merge on the device.

    Returns:
      float32 [out, in] of the same kind; `weight` itself where the module has no adapter.
    """
    slot = None if model.lora is None else _adapted(model).get(name)
    if slot is None or model.lora is None:
        return weight
    xp = jnp if isinstance(weight, jax.Array) else np
    a, b = (xp.asarray(slot.take(model.trainable, leaf)) for leaf in ("lora_A", "lora_B"))
    product = jnp.matmul(a, b, precision="highest") if xp is jnp else a @ b
    merged = weight + np.float32(model.lora.scaling) * product.T
    if f"{slot.path}.lora_magnitude" in model.trainable:
        norm = xp.linalg.norm(merged, axis=1)
        merged = merged * (xp.asarray(slot.take(model.trainable, "lora_magnitude")) / norm)[:, None]
    return merged


def config_from_peft(fields: Mapping[str, Any]) -> LoraConfig:
    """adapter_config.json -> LoraConfig; raises ValueError naming a field that is set and not supported."""
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"adapter_config.json has peft_type={fields.get('peft_type')!r}; jaxtune reads LORA")
    for name, neutral in _UNSUPPORTED.items():
        if name in fields and fields[name] not in neutral:
            raise ValueError(
                f"adapter_config.json has {name}={fields[name]!r}, which jaxtune does not support"
            )
    targets, layers = fields["target_modules"], fields.get("layers_to_transform")
    return LoraConfig(
        r=fields["r"],
        lora_alpha=fields["lora_alpha"],
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        lora_dropout=fields.get("lora_dropout", 0.0),
        use_rslora=fields.get("use_rslora", False),
        use_dora=fields.get("use_dora", False),
        layers_to_transform=None
        if layers is None
        else tuple([layers] if isinstance(layers, int) else layers),
        modules_to_save=tuple(fields.get("modules_to_save") or ()),
    )


def config_to_peft(config: LoraConfig, base_model: str, revision: str | None = None) -> dict[str, Any]:
    """LoraConfig -> the fields of adapter_config.json that PEFT needs to rebuild it."""
    targets = config.target_modules if isinstance(config.target_modules, str) else list(config.target_modules)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": targets,
        "lora_dropout": config.lora_dropout,
        "bias": "none",
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "init_lora_weights": True,
        "layers_to_transform": list(config.layers_to_transform)
        if config.layers_to_transform is not None
        else None,
        "modules_to_save": list(config.modules_to_save) or None,
        "fan_in_fan_out": False,
    }


def read_adapter(folder: Path, side: TextSide | None = None) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """A PEFT adapter folder as (config, tensors).

    Args:
      side: where the model is the text model of a larger one: the folder holds an adapter of that one.

    Raises:
      ValueError: the adapter is on modules that the text model has not.
    """
    config = config_from_peft(json.loads((folder / "adapter_config.json").read_text()))
    tensors = load_file(folder / "adapter_model.safetensors")
    return (config, tensors) if side is None else _on_text_model(config, tensors, side)


def _on_text_model(
    config: LoraConfig, tensors: Mapping[str, np.ndarray], side: TextSide
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The inverse of `on_whole_model`."""
    found = {name: side.own_name(name.removeprefix(PEFT_PREFIX)) for name in tensors}
    absent = sorted(name.removeprefix(PEFT_PREFIX) for name, own in found.items() if own is None)
    if absent:
        raise ValueError(
            f"the adapter is on more than the language part ({absent[0]}, {len(absent)} tensors in all); load it "
            "without text_only=True"
        )
    own = {f"{PEFT_PREFIX}{found[name]}": value for name, value in tensors.items()}
    if (embedding := PEFT_PREFIX + side.embedding) in tensors:
        rows = len(tensors[embedding]) - side.rows_behind
        own[f"{PEFT_PREFIX}model.embed_tokens.weight"] = tensors[embedding][:rows]
    return _by_names(config, own), own


def on_whole_model(
    config: LoraConfig, tensors: Mapping[str, np.ndarray], reader: TextReader
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """An adapter of a text model as one of the model that `reader` reads it from, PEFT's tensors with it."""
    side = reader.side
    whole = {PEFT_PREFIX + side.whole_name(name.removeprefix(PEFT_PREFIX)): v for name, v in tensors.items()}
    if (embedding := PEFT_PREFIX + side.embedding) in whole:
        whole[embedding] = np.concatenate([whole[embedding], reader.rows_behind().astype(np.float32)])
    return _by_names(config, whole), whole


def _by_names(config: LoraConfig, tensors: Mapping[str, np.ndarray]) -> LoraConfig:
    """The same adapter with the full names of its modules: patterns and numbers of layers are those of one model."""
    names = {name.removeprefix(PEFT_PREFIX).split(".lora_")[0] for name in tensors if ".lora_" in name}
    return replace(config, target_modules=tuple(sorted(names)), layers_to_transform=None)
