#!/usr/bin/env bash
# A streamed teacher of more bytes than its memory, beside the same one resident: rates by sweep, peaks, bytes read.
#
#     benches/streamed.sh DIR [layers] [hidden] [vocab]      # DIR has room for the weights; they stay there
#
# MEMORY_MIB is the budget (and SPILL_MIB that of a run whose hidden states go to a file), SWEEPS the lengths of sweeps in
# tokens, TOKENS how many the resident teacher and the longest sweep take. The defaults take a quarter of an hour, on 16
# experts in each of 7 layers, 8.0 GB, which fit into 24 GiB resident. Lines of JSON go to benches/results/streamed.jsonl,
# and benches/peers/streamed_picture.py draws them.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?where to put the weights}
layers=${2:-7} hidden=${3:-2560} vocab=${4:-32768}
memory=${MEMORY_MIB:-1408} spill=${SPILL_MIB:-1024} tokens=${TOKENS:-8192}
sweeps=${SWEEPS:-512 1024 2048 4096 8192}
results=benches/results/streamed.jsonl

program=$(cargo bench --workspace --bench streamed --no-run --message-format=json |
    sed -n 's/.*"executable":"\([^"]*streamed-[^"]*\)".*/\1/p' | tail -n 1)
run() {
    "$program" "$@" | tee -a "$results"
}

: >"$results"
test -e "$dir/config.json" || run write "$dir" "$layers" "$hidden" "$vocab"
run read "$dir"
run resident "$dir" "$tokens"
for sweep in $sweeps; do
    # Two sweeps, of half of the tokens at most.
    count=$((2 * sweep < tokens / 2 ? 2 * sweep : tokens / 2))
    run streamed "$dir" "$memory" $((count > sweep ? count : sweep)) 512 "$sweep"
done
# The control once more, for what the machine varies by.
run resident "$dir" "$tokens"
run streamed "$dir" "$spill" "$tokens" 512 "$tokens" always
