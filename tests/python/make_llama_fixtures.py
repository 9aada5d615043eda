"""Make the tiny dense checkpoints of tests/fixtures and their golden values.

    python tests/python/make_llama_fixtures.py [NAME ...]

Each fixture is a randomly initialised model of a few layers, run by the official `transformers` class. The golden
values come from that class in float32 and again in float64, in which float32's own rounding is no part of a golden's
error: it reaches 1e-4 where the residual stream reaches 40. A third forward pass, written here from the formulas
alone, must agree with the float64 run to 1e-10; it carries switches, and REPORT.json records how far the logits move
when one mechanism is switched off, so that a test at a tolerance of 1e-4 is known to notice every one of them.

Golden keys (B = 2 rows, T = 24 tokens):
    input_ids [B,T] i64, logits and logits_f64 [B,T,V], hidden.embed, hidden.{i} (residual stream after block i),
    hidden.final_norm, attn.{i}.out (after o_proj), ffn.{i}.out (all of the float64 run, stored as f32), rope.inv_freq,
    ce_sum and ce_sum_f64 (sum over B*(T-1) positions of -log p(ids[t+1])), grad.<parameter> = d ce_sum / d parameter
    (float64 run, stored as f32), greedy.prompt [1,P], greedy.tokens [1,P+16] (prompt and continuation).
"""
import json
import math
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ROWS, TOKENS, VOCAB, PROMPT, NEW_TOKENS = 2, 24, 199, 9, 16
SENSITIVE, MARGIN = 0.05, 0.01

COMMON = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, max_position_embeddings=512, dtype="float32")

# What each fixture is, and the mechanisms whose absence a parity test must notice.
MODELS = {
    "llama2_tiny": dict(
        seed=4101,
        family="Llama",
        config=dict(
            hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
            rms_norm_eps=1e-2, tie_word_embeddings=False,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        switches={
            "no RoPE": dict(rope="none"),
            "interleaved RoPE": dict(rope="interleaved"),
            "rope theta 500000": dict(theta=500000.0),
            "norm epsilon 1e-5": dict(epsilon=1e-5),
            "no causal mask": dict(causal=False),
        },
    ),
    "llama3_tiny": dict(
        seed=4201,
        family="Llama",
        config=dict(
            hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0,
                                 high_freq_factor=4.0, original_max_position_embeddings=64),
        ),
        hub_spelling="config.hub.json",
        switches={
            "no rope scaling": dict(scaling=False),
            "rope scaling without the middle band": dict(scaling="two bands"),
            "interleaved RoPE": dict(rope="interleaved"),
            "query head j on key head j % K": dict(grouping="modulo"),
            "attention scale from hidden / heads": dict(scale=(32 // 4) ** -0.5),
        },
    ),
    "smollm2_tiny": dict(
        seed=4301,
        family="Llama",
        config=dict(
            hidden_size=36, intermediate_size=52, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=2,
            rms_norm_eps=1e-5, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=100000.0),
        ),
        hub_spelling="config.json",
        hub_drops=["head_dim"],  # to be derived from hidden / heads
        switches={
            "rope theta 10000": dict(theta=10000.0),
            "interleaved RoPE": dict(rope="interleaved"),
            "query head j on key head j % K": dict(grouping="modulo"),
        },
    ),
    "qwen2_tiny": dict(
        seed=4401,
        family="Qwen2",
        config=dict(
            hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            rms_norm_eps=1e-6, tie_word_embeddings=False, use_sliding_window=False,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        hub_spelling="config.hub.json",
        hub_drops=["layer_types"],
        hub_adds=dict(sliding_window=5),  # present and yet off, as in the published files: use_sliding_window is false
        switches={
            "no biases": dict(without=("q_proj.bias", "k_proj.bias", "v_proj.bias")),
            "no q bias": dict(without=("q_proj.bias",)),
            "no k bias": dict(without=("k_proj.bias",)),
            "no v bias": dict(without=("v_proj.bias",)),
            "interleaved RoPE": dict(rope="interleaved"),
            "query head j on key head j % K": dict(grouping="modulo"),
        },
    ),
    "qwen3_tiny": dict(
        seed=4501,
        family="Qwen3",
        config=dict(
            hidden_size=40, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, rms_norm_eps=1e-6, tie_word_embeddings=True,
            rope_parameters=dict(rope_type="default", rope_theta=1000000.0),
        ),
        switches={
            "no QK norm": dict(qk_norm="none"),
            "QK norm without its weights": dict(qk_norm="unweighted"),
            "QK norm after RoPE": dict(qk_norm="after"),
            "interleaved RoPE": dict(rope="interleaved"),
            "attention scale from hidden / heads": dict(scale=(40 // 4) ** -0.5),
        },
    ),
    "mistral_tiny": dict(
        seed=4601,
        family="Mistral",
        config=dict(
            hidden_size=32, intermediate_size=56, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            rms_norm_eps=1e-5, tie_word_embeddings=False, sliding_window=5,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0),
        ),
        switches={
            "no sliding window": dict(window=None),
            "window 6": dict(window=6),
            "window 4": dict(window=4),
            "interleaved RoPE": dict(rope="interleaved"),
        },
    ),
}


def initialise(model, seed):
    """Weights large enough that every mechanism shows in the logits, in the order of the sorted names."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.25 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(0.3 * noise)


def older_spelling(config, drops=(), adds={}):
    """The config as hub files spelled it in 2025: rope_theta and rope_scaling at the top, torch_dtype."""
    config = {key: value for key, value in config.items() if key not in drops} | adds
    rope = dict(config.pop("rope_parameters"))
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    return dict(sorted(config.items()))


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# The formulas, in float64, with a switch for each mechanism.


def rms(x, weight, epsilon):
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return y if weight is None else weight * y


def frequencies(config, theta, scaling):
    rope, d = config.rope_parameters, config.head_dim
    base = theta or rope["rope_theta"]
    f = 1.0 / (base ** (torch.arange(0, d, 2, dtype=torch.float) / d))  # float32, as the class has it
    if rope["rope_type"] != "llama3" or scaling is False:
        return f
    out = []
    for value in f:
        wavelength = 2 * math.pi / value
        ratio = rope["original_max_position_embeddings"] / wavelength
        if ratio > rope["high_freq_factor"]:
            out.append(value)
        elif ratio < rope["low_freq_factor"] or scaling == "two bands":
            out.append(value / rope["factor"])
        else:
            t = (ratio - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            out.append((1 - t) * value / rope["factor"] + t * value)
    return torch.stack(out)


def rotate(x, angle, layout):
    if layout == "none":
        return x
    cos, sin = angle.cos(), angle.sin()
    half = x.shape[-1] // 2
    if layout == "interleaved":
        a, b = x[..., 0::2], x[..., 1::2]
        return torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    a, b = x[..., :half], x[..., half:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def formulas(weights, config, ids, *, rope="half", theta=None, scaling=True, inv_freq=None, epsilon=None, causal=True,
             grouping="divide", scale=None, without=(), qk_norm="before", window="config"):
    w = {k: v.double() for k, v in weights.items()}
    epsilon = epsilon or config.rms_norm_eps
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    scale = scale or d**-0.5
    if window == "config":
        window = config.sliding_window if config.model_type == "mistral" else None
    batch, length = ids.shape
    position = torch.arange(length)
    if inv_freq is None:
        inv_freq = frequencies(config, theta, scaling)
    angle = position[:, None].double() * inv_freq.double()
    distance = position[:, None] - position[None, :]
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    if window is not None:
        visible &= distance < window  # a position sees itself and window - 1 before it

    def linear(x, name):
        y = x @ w[name + ".weight"].T
        bias = w.get(name + ".bias")
        return y if bias is None or name.split(".")[-1] + ".bias" in without else y + bias

    h = w["model.embed_tokens.weight"][ids]
    for i in range(config.num_hidden_layers):
        p = f"model.layers.{i}."
        x = rms(h, w[p + "input_layernorm.weight"], epsilon)
        qkv = []
        for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            y = linear(x, f"{p}self_attn.{part}_proj").view(batch, length, count, d).transpose(1, 2)
            if part != "v":
                norm = w.get(f"{p}self_attn.{part}_norm.weight")
                if norm is not None and qk_norm in ("before", "unweighted"):
                    y = rms(y, norm if qk_norm == "before" else None, epsilon)
                y = rotate(y, angle, rope)
                if norm is not None and qk_norm == "after":
                    y = rms(y, norm, epsilon)
            qkv.append(y)
        q, k, v = qkv
        of = torch.arange(heads) // (heads // kv_heads) if grouping == "divide" else torch.arange(heads) % kv_heads
        score = q @ k[:, of].transpose(-1, -2) * scale
        score = score.masked_fill(~visible, -torch.inf).softmax(-1)
        h = h + linear((score @ v[:, of]).transpose(1, 2).reshape(batch, length, -1), p + "self_attn.o_proj")
        x = rms(h, w[p + "post_attention_layernorm.weight"], epsilon)
        gate = torch.nn.functional.silu(linear(x, p + "mlp.gate_proj"))
        h = h + linear(gate * linear(x, p + "mlp.up_proj"), p + "mlp.down_proj")
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return rms(h, w["model.norm.weight"], epsilon) @ w[head].T


# ---------------------------------------------------------------------------------------------------------------------
# The official classes.


def in_float64(model):
    """The classes compute norms and angles in float32 whatever the dtype; give them float64. The frequencies stay the
    float32 numbers, so that an implementation which stores them in float32 can agree to 1e-9."""
    model = model.double()
    model.set_attn_implementation("sdpa")  # the eager path takes its softmax in float32
    for module in model.modules():
        name = type(module).__name__
        if name.endswith("RMSNorm"):
            module.forward = lambda x, m=module: rms(x, m.weight, m.variance_epsilon)
        elif name.endswith("RotaryEmbedding"):

            def forward(x, position_ids, m=module):
                freqs = position_ids[..., None].double() * m.inv_freq.double()
                both = torch.cat((freqs, freqs), dim=-1)
                return both.cos() * m.attention_scaling, both.sin() * m.attention_scaling

            module.forward = forward
    return model


def ce_sum(logits, ids):
    log_p = logits[:, :-1].log_softmax(-1)
    return -log_p.gather(-1, ids[:, 1:, None]).sum()


def traced(model, ids):
    """Logits, and what flows between the blocks."""
    trace, hooks = {}, []

    def keep(key):
        def hook(_module, _inputs, output):
            trace[key] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    hooks.append(model.model.embed_tokens.register_forward_hook(keep("hidden.embed")))
    hooks.append(model.model.norm.register_forward_hook(keep("hidden.final_norm")))
    for i, layer in enumerate(model.model.layers):
        hooks.append(layer.register_forward_hook(keep(f"hidden.{i}")))
        hooks.append(layer.self_attn.register_forward_hook(keep(f"attn.{i}.out")))
        hooks.append(layer.mlp.register_forward_hook(keep(f"ffn.{i}.out")))
    logits = model(ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return logits, trace


def largest(a, b):
    return (a.double() - b.double()).abs().max().item()


def greedy(model, prompt):
    """Greedy tokens, and the smallest margin by which one was chosen."""
    model.generation_config.eos_token_id = None
    arguments = dict(max_new_tokens=NEW_TOKENS, do_sample=False, attention_mask=torch.ones_like(prompt), pad_token_id=0)
    cached = model.generate(prompt, use_cache=True, **arguments)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **arguments)), "cache changes the tokens"
    top = model(cached, use_cache=False).logits[0, PROMPT - 1 : -1].topk(2).values
    return cached, (top[:, 0] - top[:, 1]).min().item()


def build(name, spec):
    config_class = getattr(transformers, spec["family"] + "Config")
    model_class = getattr(transformers, spec["family"] + "ForCausalLM")
    config = config_class(**COMMON, **spec["config"])
    if getattr(config, "head_dim", None) is None:
        config_head_dim = config.hidden_size // config.num_attention_heads
    else:
        config_head_dim = config.head_dim
    for attempt in range(200):  # until no greedy choice is a near tie
        seed = spec["seed"] + attempt
        model = model_class._from_config(config, attn_implementation="eager").float().eval()
        initialise(model, seed)
        generator = torch.Generator().manual_seed(seed + 50_000)
        ids = torch.randint(3, VOCAB, (ROWS, TOKENS), generator=generator)
        prompt = torch.randint(3, VOCAB, (1, PROMPT), generator=generator)
        with torch.no_grad():
            tokens, margin = greedy(model, prompt)
        if margin > MARGIN and len(set(tokens[0, PROMPT:].tolist())) >= NEW_TOKENS // 2:
            break
    else:
        raise SystemExit(f"{name}: no seed gives clear greedy choices")

    folder = FIXTURES / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        if old.name != "packed.safetensors":
            old.unlink()
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    saved = json.loads((folder / "config.json").read_text())
    hub_spelling = spec.get("hub_spelling")
    if hub_spelling:
        drops, adds = spec.get("hub_drops", ()), spec.get("hub_adds", {})
        write_json(folder / hub_spelling, older_spelling(saved, drops, adds))

    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        sdpa = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa").eval()
        assert largest(sdpa(ids).logits, logits) < 1e-4, "the saved checkpoint gives other logits"
        if hub_spelling:
            other = config_class.from_pretrained(folder / hub_spelling)
            reread = model_class.from_pretrained(folder, config=other, attn_implementation="eager").eval()
            assert torch.equal(reread(ids).logits, logits), f"{hub_spelling} gives other logits"

    weights = load_file(folder / "model.safetensors")
    inv_freq = model.model.rotary_emb.inv_freq.clone()
    golden = {"input_ids": ids, "logits": logits, "ce_sum": ce_sum(logits, ids), "rope.inv_freq": inv_freq}
    golden["greedy.prompt"], golden["greedy.tokens"] = prompt, tokens

    ce_sum(model(ids, use_cache=False).logits, ids).backward()
    f32_grads = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    exact = in_float64(model)
    logits_f64, trace = traced(exact, ids)
    golden.update({key: value.float() for key, value in trace.items()})
    total = ce_sum(logits_f64, ids)
    total.backward()
    golden["logits_f64"], golden["ce_sum_f64"] = logits_f64.detach(), total.detach()
    grad_error = 0.0
    for key, parameter in exact.named_parameters():
        assert parameter.grad.abs().max() > 1e-3, f"{name}: {key} has next to no gradient"
        golden["grad." + key] = parameter.grad.float()
        grad_error = max(grad_error, largest(f32_grads[key], parameter.grad) / parameter.grad.abs().max().item())
    assert set(weights) == {key for key, _ in exact.named_parameters()}
    golden = {key: value.detach().contiguous() for key, value in sorted(golden.items())}
    save_file(golden, folder / "golden.safetensors")

    config.head_dim = config_head_dim  # the formulas read it; the file holds what transformers saved
    assert largest(frequencies(config, None, True), inv_freq) < 1e-7
    written = formulas(weights, config, ids, inv_freq=inv_freq)
    assert largest(written, logits_f64) < 1e-10, largest(written, logits_f64)
    moves = {}
    for label, switch in spec["switches"].items():
        moves[label] = round(largest(formulas(weights, config, ids, **switch), logits_f64), 4)
        assert moves[label] > SENSITIVE, f"{name}: '{label}' moves the logits by {moves[label]} only"
    return dict(
        seed=seed,
        params=sum(value.numel() for value in weights.values()),
        model_bytes=(folder / "model.safetensors").stat().st_size,
        golden_bytes=(folder / "golden.safetensors").stat().st_size,
        max_abs_logit=round(logits.abs().max().item(), 4),
        ce_mean=round(total.item() / (ROWS * (TOKENS - 1)), 6),
        min_greedy_margin=round(margin, 4),
        f32_vs_f64_logits=largest(logits, logits_f64),
        f32_vs_f64_grad_rel=grad_error,
        f64_vs_formulas_logits=largest(written, logits_f64),
        hf_cached_generate_equals_uncached=True,
        sensitivity_max_abs_logit_change=moves,
    )


def main():
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    path = FIXTURES / "REPORT.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    report.update(torch=torch.__version__, transformers=transformers.__version__)
    models = report.setdefault("models", {})
    for name in sys.argv[1:] or MODELS:
        models[name] = build(name, MODELS[name])
        print(name, json.dumps(models[name]))
    write_json(path, report)


if __name__ == "__main__":
    main()
