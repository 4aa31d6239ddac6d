"""Reading and writing configs: the released files as data, round trips, and what each mistake is told."""

import copy
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.config.load import from_released, from_runtime, load_config, save_config, to_released
from dsv4.config.presets import PRESETS, flash, flash_base, nano, pro

FLASH = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 43,
    "num_hash_layers": 3,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "scale_fmt": "ue8m0",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "beta_fast": 32,
        "beta_slow": 1,
        "original_max_position_embeddings": 65536,
    },
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "topk_method": "noaux_tc",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.57.1",
    "use_cache": True,
    "vocab_size": 129280,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}

PRO = FLASH | {
    "hidden_size": 7168,
    "index_topk": 1024,
    "moe_intermediate_size": 3072,
    "n_routed_experts": 384,
    "num_attention_heads": 128,
    "num_hidden_layers": 61,
    "o_groups": 16,
    "q_lora_rank": 1536,
    "routed_scaling_factor": 2.5,
    "compress_ratios": [128, 128] + [4, 128] * 29 + [4, 0],
}

FLASH_RUNTIME = {
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "n_activated_experts": 6,
    "score_func": "sqrtsoftplus",
    "route_scale": 1.5,
    "swiglu_limit": 10.0,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "rope_head_dim": 64,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "window_size": 128,
    "original_seq_len": 65536,
    "rope_theta": 10000,
    "rope_factor": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "dtype": "fp8",
    "scale_fmt": "ue8m0",
    "expert_dtype": "fp4",
    "compress_rope_theta": 160000,
    "compress_ratios": [0, 0] + [4, 128] * 20 + [4, 0],
}


@pytest.mark.parametrize(("released", "make"), [(FLASH, flash), (PRO, pro)])
def test_released_files_are_the_presets_both_ways(released, make):
    assert from_released(released) == make()
    assert to_released(make()) == released
    assert list(to_released(make())) == list(released)  # the released order
    assert json.dumps(to_released(make())) == json.dumps(released)  # and spelling: 16, not 16.0


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name, tmp_path):
    config = PRESETS[name]()
    assert from_released(to_released(config)) == config
    save_config(config, tmp_path)
    assert load_config(tmp_path) == config
    assert load_config(tmp_path / "config.json") == config
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]  # nothing left beside it


def test_base_and_bfloat16_are_written_in_their_own_way():
    assert to_released(flash_base()) == FLASH | {"expert_dtype": "fp8"}
    assert not {"expert_dtype", "quantization_config"} & set(to_released(nano()))


def test_first_release_without_expert_dtype_is_fp4():
    assert from_released({k: v for k, v in FLASH.items() if k != "expert_dtype"}) == flash()


def test_bookkeeping_of_other_writers_is_accepted():
    renamed = {k: v for k, v in FLASH.items() if k != "torch_dtype"} | {"dtype": "bfloat16"}
    assert from_released(renamed | {"transformers_version": "5.0.0", "use_cache": False}) == flash()


def test_no_yarn():
    rope = from_released(FLASH | {"rope_scaling": None}).rope
    assert (rope.factor, rope.original_context) == (1.0, 1048576)


def test_runtime_file_is_the_preset(tmp_path):
    assert from_runtime(FLASH_RUNTIME) == flash()
    path = tmp_path / "inference.json"
    path.write_text(json.dumps(FLASH_RUNTIME))
    assert load_config(path) == flash()
    assert from_runtime(FLASH_RUNTIME | {"expert_dtype": "fp8"}) == flash_base()


@pytest.mark.parametrize(
    "name", ["compress_rope_theta", "rope_factor", "original_seq_len", "route_scale", "swiglu_limit"]
)
def test_runtime_defaults_that_are_not_released_values_are_not_assumed(name):
    with pytest.raises(ValueError, match=f"missing field {name}"):
        from_runtime({k: v for k, v in FLASH_RUNTIME.items() if k != name})


def test_runtime_constants_are_checked():
    with pytest.raises(ValueError, match=r"scale_fmt is 'float'; expected 'ue8m0'"):
        from_runtime(FLASH_RUNTIME | {"scale_fmt": "float"})
    with pytest.raises(
        ValueError, match=r"compress_ratios has 44 entries; expected n_layers \+ n_mtp_layers = 43 \+ 0"
    ):
        from_runtime(FLASH_RUNTIME | {"n_mtp_layers": 0})


MISTAKES = [
    ({"attention_bias": True}, "attention_bias is True; expected False"),
    ({"attention_bias": 0}, "attention_bias is 0; expected False"),
    ({"attention_dropout": 0.1}, "attention_dropout is 0.1; expected 0.0"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; expected 'silu'"),
    ({"num_key_value_heads": 8}, "num_key_value_heads is 8; expected 1"),
    ({"n_shared_experts": 2}, "n_shared_experts is 2; expected 1"),
    ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; expected 'sqrtsoftplus'"),
    ({"topk_method": "greedy"}, "topk_method is 'greedy'; expected 'noaux_tc'"),
    ({"norm_topk_prob": False}, "norm_topk_prob is False; expected True"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings is True; expected False"),
    ({"torch_dtype": "float16"}, "torch_dtype is 'float16'; expected 'bfloat16'"),
    ({"model_type": "deepseek_v3"}, "model_type is 'deepseek_v3'; expected 'deepseek_v4'"),
    ({"architectures": ["X"]}, "architectures is ['X']; expected ['DeepseekV4ForCausalLM']"),
    ({"use_cache": 1}, "use_cache is 1; expected true or false"),
    ({"transformers_version": 4}, "transformers_version is 4; expected a string"),
    ({"expert_dtype": "int4"}, "expert_dtype is 'int4'; expected 'fp4' or 'fp8'"),
    ({"hidden_size": True}, "hidden_size is True; expected an integer, 0 or more"),
    ({"hidden_size": 0}, "hidden_size is 0; expected a positive number"),
    ({"hidden_size": -4096}, "hidden_size is -4096; expected an integer, 0 or more"),
    ({"hidden_size": 4096.0}, "hidden_size is 4096.0; expected an integer, 0 or more"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a finite number, 0 or more"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; expected a finite number, 0 or more"),
    ({"o_groups": 7}, "o_groups is 7; expected a divisor of num_attention_heads = 64"),
    ({"qk_rope_head_dim": 63}, "qk_rope_head_dim is 63; expected an even number of at most head_dim = 512"),
    ({"index_head_dim": 96}, "index_head_dim is 96; expected a power of two"),
    ({"num_experts_per_tok": 257}, "num_experts_per_tok is 257; expected at most n_routed_experts = 256"),
    ({"num_hash_layers": 44}, "num_hash_layers is 44; expected at most the 43 layers"),
    ({"eos_token_id": 129280}, "eos_token_id is 129280; expected 0 <= id < vocab_size = 129280"),
    (
        {"num_hidden_layers": 42},
        "compress_ratios has 44 entries; expected num_hidden_layers + num_nextn_predict_layers",
    ),
    ({"compress_ratios": [0, 0, 4, 64] + [4, 128] * 19 + [4, 0]}, "compress_ratios[3] is 64; expected 0, 4 or 128"),
    ({"compress_ratios": [0, 0] + [4, 128] * 20 + [4, 4]}, "mtp_kinds is ('csa',); expected () or ('window',)"),
    ({"compress_ratios": "0"}, "compress_ratios is '0'; expected a list"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; expected an object"),
    ({"rope_scaling": FLASH["rope_scaling"] | {"type": "linear"}}, "rope_scaling.type is 'linear'; expected 'yarn'"),
    ({"rope_scaling": FLASH["rope_scaling"] | {"factor": 0.5}}, "rope_scaling.factor is 0.5; expected at least 1"),
    ({"rope_scaling": FLASH["rope_scaling"] | {"mscale": 1}}, "unknown field rope_scaling.mscale"),
    (
        {"quantization_config": FLASH["quantization_config"] | {"weight_block_size": [32, 32]}},
        "quantization_config.weight_block_size is [32, 32]; expected [128, 128]",
    ),
    ({"quantization_config": None}, "quantization_config is None; expected an object"),
    ({"hiden_size": 4096}, "unknown field hiden_size; did you mean hidden_size?"),
]


@pytest.mark.parametrize(("change", "message"), MISTAKES, ids=lambda value: str(value)[:40])
def test_mistakes_are_named(change, message):
    with pytest.raises(ValueError) as caught:
        from_released(FLASH | change)
    assert f"  - {message}" in str(caught.value)
    assert str(caught.value).startswith("config.json has 1 problem:"), caught.value


@pytest.mark.parametrize("name", sorted(set(FLASH) - {"expert_dtype", "quantization_config"}))
def test_every_missing_field_is_named_alone(name):
    with pytest.raises(ValueError) as caught:
        from_released({k: v for k, v in FLASH.items() if k != name})
    assert str(caught.value) == f"config.json has 1 problem:\n  - missing field {name}"


def test_expert_dtype_needs_quantization():
    with pytest.raises(ValueError, match="expert_dtype is 'fp4'; expected no such field"):
        from_released({k: v for k, v in FLASH.items() if k != "quantization_config"})


def test_all_problems_are_listed_at_once():
    broken = copy.deepcopy(FLASH) | {"hidden_act": "gelu", "o_groups": 7, "index_topk": -1, "hidden_sise": 1}
    broken["quantization_config"]["fmt"] = "e5m2"
    broken["compress_ratios"][2] = 8
    del broken["vocab_size"]
    with pytest.raises(ValueError) as caught:
        from_released(broken)
    lines = str(caught.value).splitlines()
    assert lines[0] == "config.json has 7 problems:"
    for name in ("hidden_act", "o_groups", "index_topk", "hidden_sise", "fmt", "compress_ratios[2]", "vocab_size"):
        assert sum(f" {name}" in line or f".{name}" in line for line in lines[1:]) == 1, name


def test_two_faults_of_one_room_are_both_listed():
    with pytest.raises(ValueError, match="2 problems") as caught:
        from_released(FLASH | {"o_groups": 7, "qk_rope_head_dim": 63})
    assert "o_groups is 7" in str(caught.value)
    assert "qk_rope_head_dim is 63" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        {"architectures": ["DeepseekV41ForCausalLM"], "text_config": {}, "vision_config": {}},
        FLASH | {"model_type": "deepseek_v41"},
        FLASH | {"architectures": ["DeepseekV41ForCausalLM"]},
    ],
)
def test_v41_is_recognised(data, tmp_path):
    with pytest.raises(ValueError, match=r"this is a DeepSeek-V4\.1 config; expected DeepSeek-V4: .*Engram"):
        from_released(data)
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"DeepSeek-V4\.1"):
        load_config(tmp_path)


@pytest.mark.parametrize(("read", "data"), [(from_released, FLASH), (from_runtime, FLASH_RUNTIME)])
def test_dspark_is_recognised(read, data):
    with pytest.raises(ValueError, match=r"this is a DSpark checkpoint \(it has dspark_block_size\).*three-stage"):
        read(data | {"dspark_block_size": 5, "dspark_noise_token_id": 128799})


def test_files_that_are_not_there_or_not_configs(tmp_path):
    with pytest.raises(ValueError, match=r"expected one that holds a config\.json"):
        load_config(tmp_path)
    with pytest.raises(ValueError, match="expected a file that exists"):
        load_config(tmp_path / "absent.json")
    with pytest.raises(ValueError, match=r"expected a preset name, a directory or a \.json file that exists"):
        load_config(tmp_path / "absent")
    with pytest.raises(ValueError, match="did you mean nano"):
        load_config("nanno")
    path = tmp_path / "bad.json"
    for text, message in (
        ("{", "expected a JSON object"),
        ("[1]", "the file holds a list; expected a JSON object"),
        ('{"dim": 1, "dim": 2}', "field dim is given twice"),
        ('{"dim": 1}', "bad.json: inference config has"),
        ('{"hidden_size": 1}', "bad.json: config.json has"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message.replace("[", r"\[")):
            load_config(path)


def test_a_preset_name_means_the_preset_even_beside_a_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    save_config(flash(), tmp_path / "nano")
    assert load_config("nano") == nano()
    assert load_config("./nano") == flash()


def test_saving_refuses_what_could_not_be_read_back(tmp_path):
    with pytest.raises(ValueError, match=r"expected a directory that exists or a name that ends in \.json"):
        save_config(nano(), tmp_path / "absent")
    with pytest.raises(ValueError, match="expected an existing directory"):
        save_config(nano(), tmp_path / "absent" / "config.json")
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=50, deadline=None)
@given(
    layers=st.lists(st.sampled_from(["window", "csa", "hca"]), min_size=1, max_size=9),
    mtp=st.booleans(),
    storage=st.sampled_from(["fp4", "fp8", "bfloat16"]),
    hidden=st.integers(1, 9).map(lambda n: 32 * n),
    scale=st.floats(0.1, 9, allow_nan=False),
    theta=st.floats(2, 1e6),
)
def test_any_valid_config_survives_json(layers, mtp, storage, hidden, scale, theta):
    config = nano()
    config = dataclasses.replace(
        config,
        layer_kinds=tuple(layers),
        mtp_kinds=("window",) if mtp else (),
        storage=storage,
        hidden_size=hidden,
        moe=dataclasses.replace(config.moe, routed_scale=scale, num_hash_layers=min(2, len(layers))),
        rope=dataclasses.replace(config.rope, theta=theta),
    )
    assert from_released(json.loads(json.dumps(to_released(config)))) == config
