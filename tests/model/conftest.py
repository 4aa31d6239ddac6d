"""The toy models, and the published code of transformers with the same weights."""

import copy
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import dsv4
from dsv4.config.model import ModelConfig
from dsv4.model.transformer import Transformer
from dsv4.testing.toys import flash_like, pro_like, toy_model, toy_token_ids

TOYS = {"flash_like": flash_like, "pro_like": pro_like}
TOKENS = 300  # 75 CSA entries, 2 HCA entries and a rest of 44

# Our names to theirs, applied in order. The indexer's parts come before the compressor's, whose names they share.
RENAMES = [
    (r"^embed\.", "model.embed_tokens."),
    (r"^head\.", "lm_head."),
    (r"^hc_head_", "model.hc_head.hc_"),
    (r"^(layers|norm)\b", r"model.\1"),
    (r"\.attn_norm\.", ".input_layernorm."),
    (r"\.ffn_norm\.", ".post_attention_layernorm."),
    (r"\.hc_(attn|ffn)_", r".\1_hc."),
    (r"\.attn\.", ".self_attn."),
    (r"\.ffn\.", ".mlp."),
    (r"\.indexer\.compressor\.", ".indexer."),
    (r"\.self_attn\.indexer\.", ".self_attn.compressor.indexer."),
    (r"\.weights_proj\.", ".scorer.weights_proj."),
    (r"(compressor(?:\.indexer)?)\.wkv\.", r"\1.kv_proj."),
    (r"\.wgate\.", ".gate_proj."),
    (r"\.ape$", ".position_bias"),
    (r"(compressor(?:\.indexer)?)\.norm\.", r"\1.kv_norm."),
    (r"\.wq_a\.", ".q_a_proj."),
    (r"\.q_norm\.", ".q_a_norm."),
    (r"\.wq_b\.", ".q_b_proj."),
    (r"\.wkv\.", ".kv_proj."),
    (r"\.wo_(a|b)\.", r".o_\1_proj."),
    (r"\.attn_sink$", ".sinks"),
    (r"\.gate\.bias$", ".gate.e_score_correction_bias"),
    (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
    (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
    (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
    (r"\.experts\.w2$", ".experts.down_proj"),
]


def in_their_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename our tensors to theirs; w1 and w3 of the experts become one, w1's rows first."""
    theirs = {}
    for ours, tensor in tensors.items():
        name = ours
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        if name.endswith(".experts.w1"):
            theirs[name.replace("w1", "gate_up_proj")] = torch.cat([tensor, tensors[ours[:-2] + "w3"]], dim=1)
        elif not name.endswith(".experts.w3"):
            theirs[name] = tensor
    return theirs


@dataclass(frozen=True)
class Parity:
    """Both implementations with one checkpoint, and the token ids they are compared on."""

    config: ModelConfig
    ours: Transformer
    theirs: torch.nn.Module
    their_mtp: torch.nn.Module
    loading: dict
    token_ids: torch.Tensor
    in_their_names = staticmethod(in_their_names)

    def their_logits(self, mtp: bool = False) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return logits and, when asked, the MTP block's, with the join written out here."""
        seen = []
        hook = self.theirs.model.hc_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits = self.theirs(self.token_ids).logits
        hook.remove()
        if not mtp:
            return logits
        block, D, eps = self.ours.mtp[0], self.config.hidden_size, self.config.norm_eps
        next_ids, streams = self.token_ids[:, 1:], seen[0][:, :-1]
        embedded = F.rms_norm(self.theirs.model.embed_tokens(next_ids), (D,), block.enorm.weight, eps)
        streams = F.rms_norm(streams, (D,), block.hnorm.weight, eps)  # [B, T - 1, N, D]
        joined = (embedded @ block.e_proj.weight.T).unsqueeze(2) + streams @ block.h_proj.weight.T
        hook = self.their_mtp.model.layers[0].register_forward_pre_hook(lambda _, args: (joined, *args[1:]))
        mtp_logits = self.their_mtp(next_ids).logits
        hook.remove()
        return logits, mtp_logits


def one_layer_of_theirs(ours: Transformer, theirs: torch.nn.Module) -> torch.nn.Module:
    """Build their model of a single window layer, to stand for the MTP block, which they do not have."""
    config = copy.deepcopy(theirs.config)
    config.num_hidden_layers, config.layer_types, config.mlp_layer_types = 1, ["sliding_attention"], ["moe"]
    model = type(theirs)(config)
    tensors = ours.state_dict()
    block = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix("mtp.0.")
        if inner != name and not re.match(r"e_proj|h_proj|enorm|hnorm", inner):
            block[inner if re.match(r"norm|hc_head", inner) else f"layers.0.{inner}"] = tensor
    block |= {name: tensors[name] for name in ("embed.weight", "head.weight")}
    model.load_state_dict(in_their_names(block))
    return model.eval()


@pytest.fixture(scope="session", params=TOYS)
def parity(request, tmp_path_factory) -> Parity:
    from transformers import AutoModelForCausalLM

    config = TOYS[request.param]()
    model = toy_model(config)
    directory = tmp_path_factory.mktemp("parity") / request.param
    dsv4.save_model(model, directory)
    # Their fast experts want sizes in multiples of 4.
    theirs, loading = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    return Parity(
        config=config,
        ours=model,
        theirs=theirs,
        their_mtp=one_layer_of_theirs(model, theirs),
        loading=loading,
        token_ids=toy_token_ids(config, 2, TOKENS),
    )
