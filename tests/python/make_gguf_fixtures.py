"""Make the small GGUF files of tests/fixtures/gguf and what they must be read as, by the `gguf` Python package.

    python tests/python/make_gguf_fixtures.py

    blocks.gguf, blocks.safetensors    one tensor of each type, and `gguf.quants.dequantize` of it
    llama.gguf, llama.safetensors      a Llama with a byte-level tokenizer, in five types, named and permuted as
                                       llama.cpp's converter does, with the divisors of Llama 3's rotary scaling
    llama4.gguf, llama4.safetensors    a Llama 4 with split and transposed experts, likewise

The goldens of models have input_ids [2,24] and the logits of the official `transformers` class in float32 with the
weights that the package reads from the file. llama.tokenizer.json has ids of some texts by `tokenizers`.
"""
import json
import math
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "gguf"


def tensor_of(reader, name):
    for tensor in reader.tensors:
        if tensor.name == name:
            return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
                                    .reshape(tensor.shape.tolist()[::-1]).copy())
    raise KeyError(name)


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer, name, weight, kind):
    weight = np.ascontiguousarray(weight.float().numpy())
    writer.add_tensor(name, quantize(weight, kind), raw_dtype=kind)


def blocks():
    rng = np.random.default_rng(5)
    writer = GGUFWriter(FIXTURES / "blocks.gguf", "llama")
    values = rng.standard_normal((3, 512)).astype(np.float32)
    for kind in [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1]:
        writer.add_tensor(kind.name, quantize(values, kind), raw_dtype=kind)
    # The package does not write these two: any bytes are blocks, as long as their f16 scales are finite.
    for kind, size, halves in [(Type.Q4_K, 144, (0, 2)), (Type.Q6_K, 210, (208,))]:
        data = rng.integers(0, 256, (3, 2, size), dtype=np.uint8)
        for at in halves:
            scales = (rng.standard_normal((3, 2)) * 0.01).astype(np.float16)
            data[:, :, at:at + 2] = scales[..., None].view(np.uint8)
        writer.add_tensor(kind.name, data.reshape(3, 2 * size), raw_dtype=kind)
    finish(writer)
    reader = GGUFReader(FIXTURES / "blocks.gguf")
    save_file({tensor.name: tensor_of(reader, tensor.name) for tensor in reader.tensors}, FIXTURES / "blocks.safetensors")


def permute(weight, heads):
    """What the converter does to query and key rows of `llama`."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def unpermute(weight, heads):
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if name.endswith("norm.weight") else 0.15 * noise)


def golden(model, name):
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        save_file({"input_ids": ids, "logits": model(ids).logits.contiguous()}, FIXTURES / f"{name}.safetensors")


def tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("1", "2"), ("Ġ", "a")]
    tokens = ["<|end|>", "<|start|>"] + alphabet + [left + right for left, right in merges]
    made = Tokenizer(models.BPE({token: id for id, token in enumerate(tokens)}, merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    made.decoder = decoders.ByteLevel()
    texts = ["the hen in a tin", "in 1212, then", "déjà vu  \n\tthe", "<|end|>"]
    cases = [{"text": text, "ids": made.encode(text).ids} for text in texts]
    (FIXTURES / "llama.tokenizer.json").write_text(json.dumps(cases) + "\n")
    return tokens, [" ".join(pair) for pair in merges]


def llama():
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                   original_max_position_embeddings=8192, rope_theta=500000.0)
    tokens, merges = tokenizer()
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=len(tokens), max_position_embeddings=512, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters=scaling, bos_token_id=1, eos_token_id=0)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    randomise(model, 81)
    writer = GGUFWriter(FIXTURES / "llama.gguf", "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    divisors = []
    for frequency in 500000.0 ** (-torch.arange(0, 16, 2, dtype=torch.float32) / 16):
        wavelength = 2 * math.pi / frequency
        if wavelength < 8192 / 4:
            divisors.append(1.0)
        elif wavelength > 8192:
            divisors.append(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            divisors.append(1 / ((1 - smooth) / 8.0 + smooth))
    add(writer, "rope_freqs.weight", torch.tensor(divisors), Type.F32)
    kinds = {"q": Type.Q8_0, "k": Type.Q4_1, "v": Type.F16, "o": Type.BF16, "gate": Type.Q4_0, "up": Type.Q4_1, "down": Type.Q8_0}
    add(writer, "token_embd.weight", model.model.embed_tokens.weight.detach(), Type.Q8_0)
    add(writer, "output_norm.weight", model.model.norm.weight.detach(), Type.F32)
    places = {}
    for i, layer in enumerate(model.model.layers):
        add(writer, f"blk.{i}.attn_norm.weight", layer.input_layernorm.weight.detach(), Type.F32)
        add(writer, f"blk.{i}.ffn_norm.weight", layer.post_attention_layernorm.weight.detach(), Type.F32)
        for part, name in [("q", "attn_q"), ("k", "attn_k"), ("v", "attn_v"), ("o", "attn_output")]:
            weight = getattr(layer.self_attn, f"{part}_proj").weight
            heads = {"q": 4, "k": 2}.get(part)
            add(writer, f"blk.{i}.{name}.weight", permute(weight.detach(), heads) if heads else weight.detach(), kinds[part])
            places[f"blk.{i}.{name}.weight"] = (weight, heads)
        for part in ["gate", "up", "down"]:
            weight = getattr(layer.mlp, f"{part}_proj").weight
            add(writer, f"blk.{i}.ffn_{part}.weight", weight.detach(), kinds[part])
            places[f"blk.{i}.ffn_{part}.weight"] = (weight, None)
    finish(writer)
    reader = GGUFReader(FIXTURES / "llama.gguf")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(tensor_of(reader, "token_embd.weight"))
        for name, (weight, heads) in places.items():
            read = tensor_of(reader, name)
            weight.copy_(unpermute(read, heads) if heads else read)
    golden(model, "llama")


def llama4():
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=24, intermediate_size_mlp=40, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=61, num_local_experts=3, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=8192, floor_scale=8, attn_scale=0.1, use_qk_norm=True,
        attn_temperature_tuning=True, max_position_embeddings=128, rope_theta=500000.0, pad_token_id=None,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    model = Llama4ForCausalLM(config)
    randomise(model, 82)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    writer = GGUFWriter(FIXTURES / "llama4.gguf", "llama4")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(4)
    writer.add_feed_forward_length(40)
    writer.add_expert_feed_forward_length(24)
    writer.add_expert_count(3)
    writer.add_expert_used_count(1)
    writer.add_interleave_moe_layer_step(2)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(500000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_uint32("llama4.attention.temperature_length", 8)
    writer.add_float32("llama4.attention.temperature_scale", 0.1)
    state = model.state_dict()
    names = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
             "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
             "feed_forward.router": "ffn_gate_inp", "feed_forward.gate_proj": "ffn_gate",
             "feed_forward.up_proj": "ffn_up", "feed_forward.down_proj": "ffn_down",
             "feed_forward.shared_expert.gate_proj": "ffn_gate_shexp",
             "feed_forward.shared_expert.up_proj": "ffn_up_shexp",
             "feed_forward.shared_expert.down_proj": "ffn_down_shexp"}
    whole = {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}
    for name, weight in state.items():
        kind = Type.F32 if name.endswith("norm.weight") else Type.BF16
        if name in whole:
            add(writer, whole[name] + ".weight", weight, kind)
            continue
        _, _, layer, rest = name.split(".", 3)
        if rest.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=-1)
            add(writer, f"blk.{layer}.ffn_gate_exps.weight", gate.transpose(1, 2), kind)
            add(writer, f"blk.{layer}.ffn_up_exps.weight", up.transpose(1, 2), kind)
        elif rest.endswith("experts.down_proj"):
            add(writer, f"blk.{layer}.ffn_down_exps.weight", weight.transpose(1, 2), kind)
        else:
            add(writer, f"blk.{layer}.{names[rest.removesuffix('.weight')]}.weight", weight, kind)
    finish(writer)
    golden(model, "llama4")


FIXTURES.mkdir(parents=True, exist_ok=True)
blocks()
llama()
llama4()
