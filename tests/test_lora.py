"""Adapters: which layers get one, how it starts, and that PEFT agrees."""

import jax
import numpy as np
import peft
import pytest
import tiny_models

from jaxtune import lora, models
from jaxtune.fast import FastLanguageModel
from jaxtune.lora import LoraConfig
from jaxtune.models.layers import Linear

pytestmark = pytest.mark.usefixtures("quick_compilation")

TARGETS = {
    "all-linear": "all-linear",
    "list": ("q_proj", "down_proj"),
    "full name": ("model.layers.1.mlp.up_proj",),
    "regex": r".*layers\.0\.(self_attn\.[qv]|mlp\.gate)_proj",
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("layers", [None, (1,)])
def test_targets_are_those_of_peft(name, layers):
    if layers and isinstance(TARGETS[name], str):
        pytest.skip("PEFT does not take layers_to_transform with a string")
    config = tiny_models.make_config("llama")
    targets = TARGETS[name] if isinstance(TARGETS[name], str) else list(TARGETS[name])
    options = {"target_modules": targets, "layers_to_transform": list(layers) if layers else None}
    judge = peft.get_peft_model(
        tiny_models.make_model(config), peft.LoraConfig(task_type="CAUSAL_LM", **options)
    )
    adapted = (n for n, _ in judge.named_parameters() if "lora_A" in n)
    want = {n.removeprefix("base_model.model.").removesuffix(".lora_A.default.weight") for n in adapted}
    module = models.build(config)
    got = lora.target_names(module, LoraConfig(target_modules=TARGETS[name], layers_to_transform=layers))
    assert got == want


def test_a_target_that_matches_nothing_lists_what_exists():
    module = models.build(tiny_models.make_config("llama"))
    with pytest.raises(
        ValueError, match="'wq' matches no layer of this model; it has down_proj, gate_proj, k_proj"
    ):
        lora.attach(module, LoraConfig(target_modules=("q_proj", "wq")))
    with pytest.raises(ValueError, match=r"layers \[9\]; the model has 0 to 1"):
        lora.attach(module, LoraConfig(layers_to_transform=(9,)))
    with pytest.raises(ValueError, match=r"'0, 2', a regular expression for whole names, .*names as a list"):
        lora.attach(module, LoraConfig(target_modules="0, 2"))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 0}, "r, the rank"),
        ({"lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"target_modules": ".*q_proj", "layers_to_transform": (0,)}, "needs target_modules by name"),
        ({"target_modules": ("q_proj", 2)}, r"holds 2; expected names, .* into layers_to_transform"),
        ({"target_modules": 5}, "holds 5; expected names"),
        ({"layers_to_transform": ("0, 2",)}, r"holds '0, 2'; expected layers' numbers, as \[0, 2\]"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"modules_to_save": ("norm",)}, "modules_to_save can hold embed_tokens, lm_head"),
    ],
)
def test_bad_configs_raise(change, message):
    with pytest.raises(ValueError, match=message):
        LoraConfig(**change)


@pytest.fixture
def base(tiny_model_dir):
    return FastLanguageModel.from_pretrained(tiny_model_dir("llama"), dtype="float32", max_seq_length=None)[0]


def leaves_of(model, ending):
    return {path: np.asarray(v) for path, v in model.trainable.items() if path.endswith(ending)}


@pytest.mark.parametrize("kind", [True, "gaussian"])
def test_first_weights_are_drawn_as_pefts(kind, base):
    model = FastLanguageModel.get_peft_model(base, r=16, init_lora_weights=kind)
    for path, a in leaves_of(model, "lora_A").items():
        fan_in = a.shape[-2]
        want = 1 / 16 if kind == "gaussian" else 1 / np.sqrt(3 * fan_in)
        assert abs(a.std() / want - 1) < 0.05, path
        if kind is True:
            assert np.abs(a).max() <= 1 / np.sqrt(fan_in)
    assert not any(b.any() for b in leaves_of(model, "lora_B").values())


def test_random_state_decides_the_first_weights(base):
    runs = [FastLanguageModel.get_peft_model(base, random_state=seed).trainable for seed in (1, 1, 2)]
    path = next(p for p in runs[0] if p.endswith("lora_A"))
    assert (runs[0][path] == runs[1][path]).all() and (runs[0][path] != runs[2][path]).any()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_fresh_adapter_changes_nothing(use_dora, base):
    ids = np.arange(3, 35).reshape(2, 16)
    want = base.logits(ids)
    got = FastLanguageModel.get_peft_model(base, use_dora=use_dora).logits(ids)
    np.testing.assert_allclose(got, want, atol=2e-6 * float(np.abs(want).max()))


def test_a_second_adapter(base):
    model = FastLanguageModel.get_peft_model(base, r=8)
    with pytest.warns(UserWarning, match="already has this adapter"):
        assert FastLanguageModel.get_peft_model(model, r=8) is model
    with pytest.raises(TypeError, match="already has another adapter"):
        FastLanguageModel.get_peft_model(model, r=4)


def test_head_among_the_targets_is_trained_whole(base):
    model = FastLanguageModel.get_peft_model(base, target_modules=["q_proj", "embed_tokens", "lm_head"])
    assert model.lora.modules_to_save == ("embed_tokens", "lm_head")
    assert model.trainable["lm_head.weight"].dtype == np.float32
    assert "lm_head.weight" not in model.base


def test_dropout_is_on_with_a_key_only(base):
    from jaxtune.models.names import join

    model = FastLanguageModel.get_peft_model(base, lora_dropout=0.5, init_lora_weights=False)
    ids = np.arange(3, 19)[None]
    positions, segments = np.arange(16)[None], np.ones((1, 16), np.int32)

    @jax.jit
    def hidden(key):
        module = join(model.graphdef, model.trainable, model.base)
        keys = None if key is None else key[None]  # one a row
        return module.hidden(module.embed(ids), positions, segments, key=keys)[0]

    assert (hidden(None) == hidden(None)).all()
    assert (hidden(jax.random.key(0)) == hidden(jax.random.key(0))).all()
    assert (hidden(jax.random.key(0)) != hidden(jax.random.key(1))).any()


def test_dropout_keeps_the_mean():
    """Kept inputs are scaled up, so that over many keys a layer's output is the one without dropout."""
    rng = np.random.default_rng(0)
    linear = Linear(64, 32, bias=False, dtype=np.float32)
    linear.add_lora("q_proj", rank=4, dropout=0.25, use_dora=False)
    values = {"weight": (32, 64), "lora_A": (64, 4), "lora_B": (4, 32), "lora_scaling": ()}
    for leaf, shape in values.items():
        getattr(linear, leaf).set_value(jax.numpy.asarray(rng.normal(size=shape), np.float32))
    x = rng.normal(size=(1, 64)).astype(np.float32)
    outputs = jax.vmap(lambda key: linear(x, key[None]))(jax.random.split(jax.random.key(0), 4000))
    error = np.abs(outputs.mean(0) - linear(x)) / (outputs.std(0) / np.sqrt(4000))
    assert outputs.std(0).min() > 0 and error.max() < 5


def test_arguments_that_would_change_the_result_raise(base):
    with pytest.raises(NotImplementedError, match="bias='all'"):
        FastLanguageModel.get_peft_model(base, bias="all")
    with pytest.raises(TypeError, match="unknown arguments: lora_aplha"):
        FastLanguageModel.get_peft_model(base, lora_aplha=3)
