import json

import bitsandbytes.functional as bnb
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from jaxtune.formats.bnb_reader import BnbFolder, BnbTensor, check_quantization_config
from jaxtune.quant import dequantize_nf4, from_bnb

SKIPPED = ["lm_head", "model.layers.1.mlp.up_proj"]


@pytest.fixture(scope="module", params=[False, True], ids=["single", "double"])
def quantised(request, llama, tmp_path_factory):
    """(folder, transformers' quantised model, double?)"""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=request.param,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIPPED,
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        llama[0], quantization_config=config, device_map="cpu", dtype=torch.bfloat16
    )
    folder = tmp_path_factory.mktemp("bnb")
    model.save_pretrained(folder)
    return folder, model, request.param


def test_every_weight_equals_what_bitsandbytes_dequantises(quantised):
    folder, model, double = quantised
    reader = BnbFolder(folder)
    parameters = dict(model.named_parameters())
    assert set(reader.names()) == set(parameters)
    packed = 0
    for name, parameter in parameters.items():
        value = reader.read(name)
        if not isinstance(value, BnbTensor):
            assert value.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(value.astype(np.float32), parameter.detach().float().numpy())
            continue
        packed += 1
        assert ("weight.nested_absmax" in value.tensors) == double
        expected = bnb.dequantize_4bit(parameter.data, parameter.quant_state).float().numpy()
        assert value.shape == expected.shape == reader.info(name).shape
        ours = np.asarray(dequantize_nf4(from_bnb(value.tensors, name), ml_dtypes.bfloat16), np.float32)
        np.testing.assert_array_equal(ours, expected)
    assert packed == 13  # 2 layers × 7 linear layers, less the skipped one


def test_skipped_modules_are_plain(quantised):
    reader = BnbFolder(quantised[0])
    assert all(isinstance(reader.read(f"{name}.weight"), np.ndarray) for name in SKIPPED)


def test_missing_side_tensor_is_named(quantised, tmp_path):
    tensors = load_file(quantised[0] / "model.safetensors")
    victim = "model.layers.0.mlp.up_proj.weight"
    del tensors[f"{victim}.absmax"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"{victim}.*lacks \.absmax"):
        BnbFolder(tmp_path)
    del tensors[victim]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=rf"not the weights of: {victim}"):
        BnbFolder(tmp_path)


def test_config_of_a_real_folder_is_accepted(quantised):
    config = json.loads((quantised[0] / "config.json").read_text())
    assert check_quantization_config(config["quantization_config"], quantised[0])
    assert not check_quantization_config(None, quantised[0])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method is 'gptq'"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "load_in_4bit is not true"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bnb_4bit_quant_type is 'fp4'"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
            "bnb_4bit_quant_storage is 'bfloat16'",
        ),
    ],
)
def test_other_quantisations_are_refused_by_name(config, message):
    with pytest.raises(ValueError, match=message):
        check_quantization_config(config, "x")
