"""How fast PyTorch takes a distillation step of a student, built by `transformers` from a config.json.

    python benches/peers/train_step.py CONFIG.json [--batch 8] [--sequence 128] [--top-k 32] [--moe transformers|sparse]

One step is forward, forward KL over the top k and one tail bucket mixed with cross-entropy, backward, clipping to norm
1 and AdamW. The targets are random but well formed and are made once, outside the timing. CONFIG may be the folder that
holds it; weights are random.

`--moe transformers` runs the Llama 4 block as it ships: every expert sees every token, the unselected ones as zeros, so
its cost grows with the number of experts. `--moe sparse` sorts the tokens by expert and runs each expert on its own,
with equal results; `--check` asserts that and exits. Prints one line of JSON; tokens/s is the median of --steps.
"""
import argparse
import json
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM


def sparse_moe(self, hidden_states):
    x = hidden_states.reshape(-1, self.hidden_dim)
    logits = F.linear(x, self.router.weight)
    value, expert = logits.topk(self.top_k, dim=1)
    expert = expert.flatten()
    order = expert.argsort(stable=True)
    token = order // self.top_k
    counts = torch.bincount(expert, minlength=self.num_experts).tolist()
    routed = x[token] * value.float().sigmoid().to(x.dtype).flatten()[order, None]
    weights = zip(self.experts.gate_up_proj.unbind(0), self.experts.down_proj.unbind(0))
    outputs = []
    for part, (gate_up, down) in zip(routed.split(counts), weights):
        if len(part):
            gate, up = (part @ gate_up).chunk(2, dim=-1)
            outputs.append((up * self.experts.act_fn(gate)) @ down)
    shared = self.shared_expert(x)
    return shared.index_add(0, token, torch.cat(outputs).to(shared.dtype)), logits


def dispatch_sparsely(model):
    count = 0
    for module in model.modules():
        if type(module).__name__ == "Llama4TextMoe":
            module.forward = sparse_moe.__get__(module)
            count += 1
    return count


def log1mexp(x):
    """log(1 - exp(x)) for x < 0."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


def make_targets(config, batch, sequence, top_k):
    generator = torch.Generator().manual_seed(17)
    ids = torch.randint(config.vocab_size, (batch, sequence), generator=generator)
    log_p = (3 * torch.randn(batch, sequence, config.vocab_size, generator=generator)).log_softmax(-1)
    kept, kept_ids = log_p.topk(top_k, dim=-1)
    return ids, ids.roll(-1, dims=1), kept_ids, kept, log1mexp(kept.logsumexp(-1))


def distillation_loss(logits, labels, kept_ids, kept, tail, soft_weight):
    logits = logits.float()
    lse = logits.logsumexp(-1)
    student = logits.gather(-1, kept_ids) - lse[..., None]
    student_tail = log1mexp(student.logsumexp(-1))
    divergence = (kept.exp() * (kept - student)).sum(-1) + tail.exp() * (tail - student_tail)
    hard = lse - logits.gather(-1, labels[..., None])[..., 0]
    return (soft_weight * divergence + (1 - soft_weight) * hard).mean()


def build(config, attention):
    torch.manual_seed(17)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).train()


def check(config, a):
    """Both dispatches give the same loss and the same gradients."""
    results = []
    for sparse in (False, True):
        model = build(config, a.attention)
        with torch.no_grad():  # the usual initialisation is too small for a difference to show
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(5)
        blocks = dispatch_sparsely(model) if sparse else 0
        ids, *rest = make_targets(config, a.batch, a.sequence, a.top_k)
        loss = distillation_loss(model(ids, use_cache=False).logits, *rest, a.soft_weight)
        loss.backward()
        results.append((loss.item(), {name: p.grad for name, p in model.named_parameters()}))
    (loss_a, grads_a), (loss_b, grads_b) = results
    worst = max((grads_a[n] - grads_b[n]).abs().max().item() / grads_a[n].abs().max().item() for n in grads_a)
    same = abs(loss_a - loss_b) < 1e-4 and worst < 1e-3
    print(json.dumps(dict(what="train_step check", moe_blocks=blocks, loss_transformers=loss_a, loss_sparse=loss_b,
                          worst_relative_gradient_difference=worst, ok=same)))
    return same


def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config")
    arguments.add_argument("--batch", type=int, default=8)
    arguments.add_argument("--sequence", type=int, default=128)
    arguments.add_argument("--top-k", type=int, default=32)
    arguments.add_argument("--soft-weight", type=float, default=0.9)
    arguments.add_argument("--moe", choices=["transformers", "sparse"], default="transformers")
    arguments.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="bf16 is autocast over f32 weights")
    arguments.add_argument("--adamw", choices=["fused", "foreach"], default="fused")
    arguments.add_argument("--compile", action="store_true", help="torch.compile the model; compiling is not timed")
    arguments.add_argument("--threads", type=int, default=os.cpu_count())
    arguments.add_argument("--steps", type=int, default=20)
    arguments.add_argument("--warmup", type=int, default=3)
    arguments.add_argument("--check", action="store_true", help="compare the two dispatches instead of timing one")
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    config = AutoConfig.from_pretrained(a.config)
    if a.check:
        sys.exit(0 if check(config, a) else 1)

    model = build(config, a.attention)
    blocks = sum(type(module).__name__ == "Llama4TextMoe" for module in model.modules())
    if a.moe == "sparse":
        dispatch_sparsely(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1,
                                  **{a.adamw: True})
    run = torch.compile(model) if a.compile else model
    ids, *rest = make_targets(config, a.batch, a.sequence, a.top_k)
    load_before = os.getloadavg()[0]
    losses, seconds, phases = [], [], []
    for step in range(a.warmup + a.steps):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=a.dtype == "bf16"):
            logits = run(ids, use_cache=False).logits
        loss = distillation_loss(logits, *rest, a.soft_weight)
        forward = time.perf_counter()
        loss.backward()
        backward = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        losses.append(loss.item())
        if step >= a.warmup:
            seconds.append(end - start)
            phases.append((forward - start, backward - forward, end - backward))
    median, tokens = statistics.median(seconds), a.batch * a.sequence
    print(
        json.dumps(
            dict(
                what="train_step",
                peer="pytorch + transformers",
                tokens_per_second=round(tokens / median, 1),
                best_tokens_per_second=round(tokens / min(seconds), 1),
                worst_tokens_per_second=round(tokens / max(seconds), 1),
                milliseconds=dict(
                    zip(("forward_and_loss", "backward", "clip_and_adamw"),
                        (round(1000 * statistics.median(phase), 2) for phase in zip(*phases)))
                ),
                model=type(model).__name__,
                parameters=sum(p.numel() for p in model.parameters()),
                moe_blocks=blocks,
                moe=a.moe if blocks else "none",
                moe_note="every expert runs on every token" if blocks and a.moe == "transformers" else "",
                attention=a.attention,
                dtype=a.dtype,
                adamw=a.adamw,
                compiled=a.compile,
                batch=a.batch,
                sequence=a.sequence,
                top_k=a.top_k,
                threads=a.threads,
                steps=a.steps,
                first_loss=losses[0],
                last_loss=losses[-1],
                load_average_before=round(load_before, 2),
                torch=torch.__version__,
                transformers=transformers.__version__,
            )
        )
    )


if __name__ == "__main__":
    main()
