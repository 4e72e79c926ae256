"""GRPOConfig: TRL's defaults, foreign names, batch sizes."""

import dataclasses
import types
import warnings

import pytest

from jaxtune.rl.config import GRPOConfig

# fields of Unsloth, transformers 4 and jaxtune
OWN = """reward_timeout rollout_weights shared_prefix max_resample_rounds importance_sampling_correction
    max_prompt_length too_long embedding_learning_rate warmup_ratio logging_dir remat memory_budget_gb
    vllm_request_timeout vllm_python vllm_server_args vllm_base vllm_adapter_dir vllm_logprob_warning
    vllm_logprob_limit""".split()


def trl_defaults():
    import trl

    made = {}
    for field in dataclasses.fields(trl.GRPOConfig):
        default = field.default_factory is not dataclasses.MISSING
        made[field.name] = field.default_factory() if default else field.default
    return made


def test_defaults_are_trls():
    theirs = trl_defaults()
    other_spelling = {"output_dir": "trainer_output", "optim": "adamw", "report_to": ()}
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in OWN:
            assert field.default == other_spelling.get(field.name, theirs[field.name]), field.name


def test_every_argument_of_trl_is_known_and_its_default_asks_for_nothing():
    theirs = trl_defaults()
    ours = {field.name for field in dataclasses.fields(GRPOConfig)}
    assert theirs.keys() <= ours | GRPOConfig.FOREIGN.names | {"vllm_importance_sampling_cap"}
    assert not ours & GRPOConfig.FOREIGN.names
    with pytest.warns(UserWarning, match="ignored") as caught:
        args = GRPOConfig(**theirs | {"output_dir": "out", "steps_per_generation": None})
    assert len(caught) == 1
    assert args == GRPOConfig(output_dir="out")


def test_an_argument_that_would_change_the_result_raises():
    for name, (neutral, _) in GRPOConfig.FOREIGN.refused.items():
        other = not neutral if isinstance(neutral, bool) else "something"
        with pytest.raises(ValueError, match=name):
            GRPOConfig(**{name: other})
    with pytest.raises(TypeError, match="did you mean 'num_generations'"):
        GRPOConfig(num_generation=4)


def test_batches_follow_trl():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        args = GRPOConfig(per_device_train_batch_size=1, gradient_accumulation_steps=4, num_generations=4)
        assert (args.generation_rows, args.generation_steps, args.per_device_train_batch_size) == (4, 4, 1)
        args = GRPOConfig(per_device_train_batch_size=4, generation_batch_size=16, num_generations=8)
        assert (args.generation_rows, args.generation_steps) == (16, 4)
        args = dataclasses.replace(args, num_iterations=2)
        assert args.generation_steps == 4
    with pytest.raises(ValueError, match="not both"):
        GRPOConfig(generation_batch_size=8, steps_per_generation=1)
    with pytest.raises(ValueError, match="multiple of per_device_train_batch_size=8"):
        GRPOConfig(generation_batch_size=12)
    with pytest.raises(ValueError, match="num_generations must be at least 2"):
        GRPOConfig(num_generations=1)
    with pytest.raises(ValueError, match="num_generations_eval"):
        GRPOConfig(eval_strategy="steps", per_device_eval_batch_size=4)


def test_a_notebooks_batch_size_is_raised_to_the_group():
    with pytest.warns(UserWarning, match="raised from 1 to num_generations=6"):
        args = GRPOConfig(per_device_train_batch_size=1, gradient_accumulation_steps=1, num_generations=6)
    assert (args.per_device_train_batch_size, args.generation_rows) == (6, 6)


@pytest.mark.parametrize("accumulation, steps, iterations, needed", [
    (1, None, 1, False), (4, None, 1, False), (4, 2, 1, False), (4, 2, 2, False), (4, 3, 1, True), (1, 2, 1, True),
    (1, None, 2, True),
])  # fmt: skip
def test_old_log_probs_are_needed_where_the_policy_has_moved(accumulation, steps, iterations, needed):
    args = GRPOConfig(
        gradient_accumulation_steps=accumulation, steps_per_generation=steps, num_iterations=iterations
    )
    assert args.needs_old_log_probs is needed
    assert dataclasses.replace(args, use_vllm=True).needs_old_log_probs
    assert (
        dataclasses.replace(args, use_vllm=True, importance_sampling_correction=False).needs_old_log_probs
        is needed
    )


def test_unsloths_sampling_parameters():
    given = dict(temperature=1.0, min_p=0.1, top_p=1.0, top_k=-1, seed=3407, stop=["</s>"], max_tokens=16)
    params = types.SimpleNamespace(**given, include_stop_str_in_output=True)
    with pytest.warns(UserWarning, match="unsloth_num_chunks"):
        args = GRPOConfig(vllm_sampling_params=params, unsloth_num_chunks=-1, max_prompt_length=256)
    assert args.generation_kwargs == {"min_p": 0.1, "top_k": 0, "seed": 3407, "stop_strings": ("</s>",)}
    assert args.max_prompt_length == 256
    with pytest.raises(ValueError, match="generation_kwargs: num_beams=4"):
        GRPOConfig(generation_kwargs={"num_beams": 4})


def test_spellings():
    assert GRPOConfig(scale_rewards=True).scale_rewards == "group"
    assert GRPOConfig(scale_rewards=False).scale_rewards == "none"
    assert GRPOConfig(reward_weights=[1, 2]).reward_weights == (1.0, 2.0)
    assert GRPOConfig(vllm_importance_sampling_cap=2.0).vllm_importance_sampling_clip_max == 2.0
    with pytest.raises(ValueError, match="loss_type='ppo'"):
        GRPOConfig(loss_type="ppo")
    with pytest.raises(ValueError, match="vespo"):
        GRPOConfig(loss_type="vespo", use_vllm=True)


def test_fields_have_help():
    import docstring_parser

    described = {p.arg_name: p.description for p in docstring_parser.parse_from_object(GRPOConfig).params}
    own = GRPOConfig.__annotations__.keys() & {field.name for field in dataclasses.fields(GRPOConfig)}
    assert all(described.get(name) for name in own)
