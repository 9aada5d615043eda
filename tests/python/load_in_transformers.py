"""Open a checkpoint written by limbeck with `transformers` and compare its logits with limbeck's.

    python tests/python/load_in_transformers.py CHECKPOINT_DIR LOGITS.safetensors TOKENS.safetensors [--tolerance 2e-4]
        [--rounded-from F32_DIR] [--in-bf16]

LOGITS holds `logits` [B,T,V] as limbeck computed them, TOKENS holds `input_ids` [B,T] (or [T] and [T,V]). Checks that
every weight finds its place and none is left over, that the tokenizer, when there is one, loads through AutoTokenizer
and gives the ids of tokenizer.json, and that the largest difference of the logits is within the tolerance. With
--rounded-from, also that each weight has the bits of the one in F32_DIR, rounded by PyTorch to the type that the
checkpoint is stored in. With --in-bf16 the model runs once more in bfloat16, and how far its logits are then is said.
Prints one line of JSON; exits 1 and names on stderr what is wrong when something is.
"""
import argparse
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SAMPLE = "The still distils; naïve café, 日本語, 12345 + 0x1F = ?\n\tfn main() { println!(\"{}\", 6 * 7); } 🙂  end"


def check_tokenizer(folder, vocab_size, faults):
    if not (folder / "tokenizer.json").exists():
        return None
    import tokenizers

    plain = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(folder)
    ids = plain.encode(SAMPLE, add_special_tokens=False).ids
    if auto(SAMPLE, add_special_tokens=False).input_ids != ids:
        faults.append("AutoTokenizer gives other ids than tokenizer.json")
    if max(ids) >= vocab_size or len(auto) > vocab_size:
        faults.append(f"the tokenizer has {len(auto)} tokens, the model {vocab_size}")
    return type(auto).__name__


def stored(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "train_state.safetensors":
            tensors.update(load_file(file))
    return tensors


def check_rounding(folder, origin, model, result, faults):
    """The loaded weights are the stored ones, and those are the origin's in fewer bits."""
    ours, origin, loaded = stored(folder), stored(origin), model.state_dict()
    result["stored_dtypes"] = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in ours.values()})
    result["rounded_weights"] = 0
    if ours.keys() != origin.keys():
        faults.append(f"tensors in one checkpoint alone: {sorted(ours.keys() ^ origin.keys())[:5]}")
    for name in sorted(ours.keys() & origin.keys()):
        result["rounded_weights"] += (ours[name].float() != origin[name].float()).sum().item()
        if not torch.equal(origin[name].to(ours[name].dtype), ours[name]):
            faults.append(f"`{name}` is not the rounded one of the origin")
        if name not in loaded or not torch.equal(loaded[name], ours[name].to(loaded[name].dtype)):
            faults.append(f"`{name}` is not what was loaded")


def pick(path, name, faults):
    tensors = load_file(path)
    if name not in tensors:
        faults.append(f"{path} has no tensor `{name}`, only {sorted(tensors)[:8]}")
        return None
    return tensors[name]


@torch.no_grad()
def main():
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint", type=Path)
    arguments.add_argument("logits")
    arguments.add_argument("tokens")
    arguments.add_argument("--tolerance", type=float, default=2e-4, help="largest absolute difference of a logit")
    arguments.add_argument("--dtype", choices=["f32", "bf16"], default="f32", help="to run in")
    arguments.add_argument("--rounded-from", type=Path, help="the f32 checkpoint that this one was made from")
    arguments.add_argument("--in-bf16", action="store_true", help="run in bfloat16 as well")
    arguments.add_argument("--attention", choices=["eager", "sdpa"], default="eager")
    arguments.add_argument("--threads", type=int, default=1)
    a = arguments.parse_args()
    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    faults, result = [], dict(checkpoint=str(a.checkpoint))

    dtype = dict(f32=torch.float32, bf16=torch.bfloat16)[a.dtype]
    model, info = AutoModelForCausalLM.from_pretrained(
        a.checkpoint, dtype=dtype, attn_implementation=a.attention, output_loading_info=True
    )
    model.eval()
    text = model.config.get_text_config()
    result.update(model=type(model).__name__, parameters=sum(p.numel() for p in model.parameters()))
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        found = sorted(map(str, info.get(kind) or []))
        result[kind] = len(found)
        if found:
            faults.append(f"{kind}: {', '.join(found[:5])}{' ...' if len(found) > 5 else ''}")
    result["tokenizer"] = check_tokenizer(a.checkpoint, text.vocab_size, faults)
    if a.rounded_from:
        check_rounding(a.checkpoint, a.rounded_from, model, result, faults)

    ours, ids = pick(a.logits, "logits", faults), pick(a.tokens, "input_ids", faults)
    if ours is not None and ids is not None:
        ids = ids.long().reshape(-1, ids.shape[-1])
        ours = ours.float().reshape(-1, *ours.shape[-2:])
        if ours.shape != (*ids.shape, text.vocab_size):
            faults.append(f"logits are {list(ours.shape)}, the tokens ask for {[*ids.shape, text.vocab_size]}")
        else:
            theirs = torch.cat([model(row[None], use_cache=False).logits.float() for row in ids])
            difference = (theirs - ours).abs()
            largest = difference.max().item()
            result.update(
                tokens=list(ids.shape),
                max_difference=largest,
                mean_difference=difference.mean().item(),
                argmax_agreement=(theirs.argmax(-1) == ours.argmax(-1)).float().mean().item(),
                max_abs_logit=theirs.abs().max().item(),
                tolerance=a.tolerance,
            )
            if not largest <= a.tolerance:  # a NaN is over the tolerance too
                row, position, _ = torch.unravel_index(difference.nan_to_num(nan=torch.inf).argmax(), difference.shape)
                faults.append(f"logits differ by {largest:.3g} at row {row.item()} position {position.item()}, "
                              f"more than {a.tolerance:g}")
            if a.in_bf16:
                model = model.to(torch.bfloat16)
                rounded = torch.cat([model(row[None], use_cache=False).logits.float() for row in ids])
                gap = theirs.log_softmax(-1) - rounded.log_softmax(-1)
                result["bf16"] = dict(
                    max_difference=(rounded - ours).abs().max().item(),
                    mean_difference=(rounded - ours).abs().mean().item(),
                    mean_kl=(theirs.log_softmax(-1).exp() * gap).sum(-1).mean().item(),
                    argmax_agreement=(rounded.argmax(-1) == ours.argmax(-1)).float().mean().item(),
                )
    result["ok"] = not faults
    print(json.dumps(result))
    for fault in faults:
        print(f"load_in_transformers: {fault}", file=sys.stderr)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
