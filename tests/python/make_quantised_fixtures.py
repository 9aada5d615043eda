"""Make the tiny FP8 checkpoints of tests/fixtures/quantised and what they must be read as.

    python tests/python/make_quantised_fixtures.py

Each is a randomly initialised model, its weights quantised here as the named method stores them:

    fp8_channels    Llama 4 text, `compressed-tensors`: experts one by one as [out, in], a bf16 scale per output channel
    fp8_fused       Llama 4 text, `fbgemm_fp8`: experts stacked as [experts, in, out], an f32 scale per output channel
    fp8_blocks      Llama, `fp8`: an f32 scale per block of 16 x 32 (most sizes are no multiples of it), one E5M2 tensor

golden.safetensors has input_ids [2,24], the logits of the official `transformers` class in float32 with the weights
`float32(stored) * float32(scale)`, and each of those weights that was quantised, fused as that class has it, under
`weights.NAME`. codes.safetensors has all 256 numbers of both formats as torch reads them.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "quantised"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantise(weight, amax, dtype=E4M3):
    """Rounded weight and its scale; `amax` has the scale's granularity and broadcasts."""
    scale = amax / torch.finfo(dtype).max
    return (weight / scale).to(dtype), scale


def per_channel(weight):
    """[out, in] with one bf16 scale per row."""
    amax = weight.abs().amax(1, keepdim=True)
    scale = (amax / 448.0).to(torch.bfloat16)
    stored = (weight / scale.float()).clamp(-448, 448).to(E4M3)
    return stored, scale, stored.float() * scale.float()


def per_block(weight, rows, columns, dtype):
    out_blocks, in_blocks = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    stored, scale = torch.empty(weight.shape, dtype=dtype), torch.empty(out_blocks, in_blocks)
    back = torch.empty_like(weight)
    for i in range(out_blocks):
        for j in range(in_blocks):
            part = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            stored[part], factor = quantise(weight[part], weight[part].abs().max(), dtype)
            scale[i, j] = factor
            back[part] = stored[part].float() * factor
    return stored, scale, back


def randomise(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            # Representable in bf16, which is what stays unquantised.
            parameter.copy_((1 + 0.2 * noise if name.endswith("norm.weight") else 0.15 * noise).bfloat16().float())


def llama4():
    config = Llama4TextConfig(
        hidden_size=32, intermediate_size=24, intermediate_size_mlp=40, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, vocab_size=61, num_local_experts=3, num_experts_per_tok=1,
        interleave_moe_layer_step=2, attention_chunk_size=16, floor_scale=8, attn_scale=0.1, use_qk_norm=True,
        attn_temperature_tuning=True, max_position_embeddings=128, rope_theta=500000.0, pad_token_id=None,
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=False, no_rope_layers=[1, 0],
    )
    config._attn_implementation = "eager"
    return Llama4ForCausalLM(config)


def finish(name, model, stored, golden, quantization):
    folder = FIXTURES / name
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    keep = ("architectures", "dtype", "transformers_version")
    unused = ("output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "problem_type",
              "chunk_size_feed_forward", "id2label", "label2id", "_name_or_path")
    config = {key: value for key, value in config.items() if key not in keep + unused}
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    ids = torch.randint(0, model.config.vocab_size, (2, 24), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        logits = model(ids).logits
    save_file({key: value.contiguous() for key, value in stored.items()}, folder / "model.safetensors")
    golden = {f"weights.{key}": value.contiguous() for key, value in golden.items()}
    save_file({"input_ids": ids, "logits": logits.contiguous(), **golden}, folder / "golden.safetensors")


def channels():
    torch.manual_seed(0)
    model = llama4()
    randomise(model, 71)
    state, stored, golden = model.state_dict(), {}, {}
    for name, weight in state.items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            prefix, fused = name.rsplit(".", 1)
            parts = ["gate_proj", "up_proj"] if fused == "gate_up_proj" else ["down_proj"]
            whole = []
            for number, expert in enumerate(weight):
                rebuilt = []
                for part, matrix in zip(parts, expert.chunk(len(parts), dim=-1)):
                    eight, scale, back = per_channel(matrix.T.contiguous())
                    stored[f"{prefix}.{number}.{part}.weight"] = eight
                    stored[f"{prefix}.{number}.{part}.weight_scale"] = scale
                    rebuilt.append(back.T)
                whole.append(torch.cat(rebuilt, dim=-1))
            golden[name] = torch.stack(whole)
        else:
            stored[name] = weight.bfloat16()
    # A dense matrix with one scale for all of it, which the same method allows.
    name = "model.layers.0.feed_forward.down_proj.weight"
    eight, scale = quantise(state[name], state[name].abs().max())
    stored[name], stored[name + "_scale"] = eight, scale.reshape(1)
    golden[name] = eight.float() * scale
    model.load_state_dict({**state, **golden})
    weights = dict(num_bits=8, type="float", strategy="channel", symmetric=True, dynamic=False)
    finish("fp8_channels", model, stored, golden, dict(
        quant_method="compressed-tensors", format="float-quantized", quantization_status="compressed",
        config_groups=dict(group_0=dict(targets=["Linear"], weights=weights,
                                        input_activations=dict(num_bits=8, type="float", strategy="token", dynamic=True))),
        ignore=["re:.*self_attn", "re:.*router", "lm_head"], kv_cache_scheme=None))


def fused():
    torch.manual_seed(0)
    model = llama4()
    randomise(model, 72)
    state, stored, golden = model.state_dict(), {}, {}
    for name, weight in state.items():
        if name.endswith("experts.gate_up_proj") or name.endswith("experts.down_proj"):
            eight, scale = quantise(weight, weight.abs().amax(1, keepdim=True))
            stored[name], golden[name] = eight, eight.float() * scale
            stored[name + "_scale"] = scale if name.endswith("gate_up_proj") else scale.transpose(1, 2)
        else:
            stored[name] = weight.bfloat16()
    model.load_state_dict({**state, **golden})
    finish("fp8_fused", model, stored, golden, dict(
        quant_method="fbgemm_fp8", activation_scale_ub=1200.0, modules_to_not_convert=["lm_head"]))


def blocks():
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=40, intermediate_size=56, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=20, vocab_size=61, max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2,
    )
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    randomise(model, 73)
    state, stored, golden = model.state_dict(), {}, {}
    state.pop("lm_head.weight")
    for name, weight in state.items():
        if name.endswith("_proj.weight"):
            dtype = E5M2 if "up_proj" in name else E4M3
            stored[name], stored[name + "_scale_inv"], golden[name] = per_block(weight, 16, 32, dtype)
        else:
            stored[name] = weight.bfloat16()
    model.load_state_dict({**state, **golden}, strict=False)
    finish("fp8_blocks", model, stored, golden, dict(
        quant_method="fp8", fmt="e4m3", activation_scheme="dynamic", weight_block_size=[16, 32]))


channels()
fused()
blocks()
every = torch.arange(256, dtype=torch.uint8)
save_file({name: every.view(dtype).float() for name, dtype in [("e4m3", E4M3), ("e5m2", E5M2)]},
          FIXTURES / "codes.safetensors")
