"""Remakes tests/fixtures/distillkit with DistillKit's own package: its compressor, its Parquet writer, its decoder.

    PYTHONPATH=path/to/DistillKit python tests/python/make_distillkit_fixture.py

Each folder has compression_config.yaml and data_0.parquet as a capture leaves them, and decoded.json: per record the tokens,
and per row the ids and the log-probabilities (as bits of f32) that DistillKit's decoder gives.
"""
import json
from pathlib import Path

import torch
import yaml
from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor
from distillkit.sample_common import StreamingParquetWriter, compressed_logit_schema

VOCABULARY = 320
LENGTHS = [9, 3, 14]

CONFIGS = {
    # Of the shape that its documentation recommends: exact head, curve, quantised residuals, distances.
    "curve": dict(k=12, exact_k=4, exact_dtype="bfloat16", polynomial_terms=[0, 1, 2, "sqrt"], term_dtype="float32",
                  residual_bins=[dict(scale_dtype="float16", element_bits=6, num_elements=4),
                                 dict(scale_dtype="float16", element_bits=3, num_elements=3)],
                  delta_encoding=True),
    # Values as they are, in narrow formats, the curve's argument from 0 to 1, one bit for a residual.
    "narrow": dict(k=10, exact_k=3, exact_dtype="float32", polynomial_terms=[0, 1, "exp"], term_dtype="float16",
                   residual_bins=[dict(scale_dtype="float32", element_bits=8, num_elements=3),
                                  dict(scale_dtype="bfloat16", element_bits=1, num_elements=4)],
                   delta_encoding=False, normalize_t=True),
    # No curve, errors carried on, wide scales.
    "diffused": dict(k=9, exact_k=1, exact_dtype="float16", polynomial_terms=None, term_dtype="float32",
                     residual_bins=[dict(scale_dtype="float64", element_bits=7, num_elements=8)],
                     delta_encoding=True, error_diffusion=True),
    "exact": dict(k=5, exact_k=5, exact_dtype="float32", polynomial_terms=None, residual_bins=[], delta_encoding=False),
}


def main():
    root = Path(__file__).parents[1] / "fixtures" / "distillkit"
    for number, (name, settings) in enumerate(CONFIGS.items()):
        random = torch.Generator().manual_seed(number)
        config = DistributionQuantizationConfig(d=VOCABULARY, **settings)
        compressor = LogprobCompressor(config=config)
        folder = root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "compression_config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
        decoded = []
        with StreamingParquetWriter(str(folder), schema=compressed_logit_schema(), file_max_rows=100, queue_maxsize=0) as writer:
            for length in LENGTHS:
                tokens = torch.randint(0, VOCABULARY, (length,), generator=random)
                logits = 3 * torch.randn(1, length - 1, VOCABULARY, generator=random)
                # A teacher that knows something: what comes is among the likely. But one row in five is surprised.
                for row in range(length - 1):
                    logits[0, row, tokens[row + 1]] = 8.0 if row % 5 else -4.0
                values, ids = torch.log_softmax(logits, dim=-1).topk(config.k)
                packed = compressor.compress_from_sparse(ids, values)
                found_ids, found = compressor.decompress_to_sparse(packed)
                writer.write({"input_ids": tokens.tolist(),
                              "compressed_logprobs": packed["compressed_logprobs"].squeeze(0).tolist(),
                              "bytepacked_indices": packed["bytepacked_indices"].squeeze(0).tolist()})
                bits = found.float().squeeze(0).contiguous().view(torch.int32)
                decoded.append({"tokens": tokens.tolist(), "ids": found_ids.squeeze(0).tolist(),
                                "bits": [[value & 0xFFFFFFFF for value in row] for row in bits.tolist()]})
        lines = ",\n".join(json.dumps(record, separators=(",", ":")) for record in decoded)
        (folder / "decoded.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
