"""limbeck and PyTorch take a distillation step of a student, in turns, on this machine.

    python benches/peers/step.py [--quick] [--rounds 7] [--shapes dense,scout] [--batch 4] [--sequence 256]

One step is forward, forward KL over the top k and one tail bucket mixed with cross-entropy, backward, clipping to norm 1
and AdamW, all in f32. PyTorch runs `transformers` as it ships, with eager attention and fused AdamW. Two students over
49,152 ids: `dense`, 6.9M parameters in the shape of Llama, and `scout`, a Scout of two blocks with eight experts and as
many active parameters. Ends with 1 when limbeck is not --target times as fast by the clock, and when others are so busy on
the machine that this cannot be told. `--quick` takes under a minute on two cores, once the bench is built.
"""
import json
import os
import sys
import tempfile

import torch
import transformers
from transformers import AutoConfig

from train_step import build, dispatch_sparsely, distillation_loss, make_targets
from turns import Limbeck, Others, arguments_of, bench_binary, report, rounds, timed

VOCAB = 49152
DENSE = dict(
    architectures=["LlamaForCausalLM"], model_type="llama", vocab_size=VOCAB, hidden_size=128, intermediate_size=384,
    num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=2048,
    rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu", tie_word_embeddings=True, attention_bias=False, mlp_bias=False,
)
SCOUT = dict(
    architectures=["Llama4ForCausalLM"], model_type="llama4_text", vocab_size=VOCAB, hidden_size=128,
    intermediate_size=192, intermediate_size_mlp=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=32, max_position_embeddings=2048, rms_norm_eps=1e-5, rope_theta=10000.0, hidden_act="silu",
    tie_word_embeddings=True, num_local_experts=8, num_experts_per_tok=1, interleave_moe_layer_step=1,
    attention_chunk_size=128, use_qk_norm=True, no_rope_layers=[1, 1, 0], attention_bias=False, pad_token_id=None,
)
SHAPES = dict(dense=DENSE, scout=SCOUT)


class Peer:
    """A student of `transformers` with its optimizer and one batch of made-up targets."""

    def __init__(self, folder, a, sparse):
        config = AutoConfig.from_pretrained(folder)
        self.model = build(config, "eager")
        if sparse:
            dispatch_sparsely(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        self.ids, *self.rest = make_targets(config, a.batch, a.sequence, a.top_k)

    def step(self):
        logits = self.model(self.ids, use_cache=False).logits
        distillation_loss(logits, *self.rest, 0.5).backward()
        del logits
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def main():
    arguments = arguments_of(__doc__, 7)
    arguments.add_argument("--shapes", default="dense,scout")
    arguments.add_argument("--batch", type=int, default=4)
    arguments.add_argument("--sequence", type=int, default=256)
    arguments.add_argument("--top-k", type=int, default=64)
    arguments.add_argument("--target", type=float, default=1.5)
    a = arguments.parse_args()
    if a.quick:
        a.rounds = 3
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    binary = a.binary or bench_binary()
    met = True
    for shape in a.shapes.split(","):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            with open(path, "w") as file:
                json.dump(SHAPES[shape], file)
            peers = {"transformers": Peer(folder, a, sparse=False)}
            if shape != "dense":
                peers["transformers, experts sorted"] = Peer(folder, a, sparse=True)
            ours = Limbeck("student", path, a.batch, a.sequence, a.top_k, binary=binary, threads=a.threads)
            for peer in peers.values():
                peer.step()
            sides = {"limbeck": ours.run}
            for name, peer in peers.items():
                sides[name] = lambda peer=peer: timed(peer.step)
            others = Others()
            seconds = rounds(sides, a.rounds, others)
            ours.close()
            pairs = [("limbeck", "transformers", a.target)]
            parameters = sum(p.numel() for p in peers["transformers"].model.parameters())
            what = f"step {shape}, {parameters / 1e6:.1f}M"
            met &= report(what, seconds, a.batch * a.sequence, pairs, others, a.results)
            if len(peers) > 1:
                report(what, seconds, a.batch * a.sequence, [("limbeck", "transformers, experts sorted", 1.0)], others, a.results)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
