#!/usr/bin/env bash
# A streamed teacher of more bytes than its memory, beside the same one resident: rates by sweep, peaks, bytes read.
#
#     benches/streamed.sh DIR [layers] [hidden] [vocab]      # DIR has room for the weights; they stay there
#
# MEMORY_MIB is the budget, SWEEPS the lengths of sweeps in tokens, TOKENS how many the resident teacher and the longest
# sweeps take. The defaults are 16 experts in each of 7 layers, 8.0 GB: they fit into 24 GiB resident. Lines of JSON go to benches/results/streamed.jsonl, and benches/peers/streamed_picture.py draws them.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?where to put the weights}
layers=${2:-7} hidden=${3:-2560} vocab=${4:-32768}
memory=${MEMORY_MIB:-1408} tokens=${TOKENS:-16384}
sweeps=${SWEEPS:-512 1024 2048 4096 8192 16384}
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
    # Four sweeps where they are short, and the same tokens as resident where they are long.
    count=$((sweep * 4 < tokens ? sweep * 4 : tokens))
    run streamed "$dir" "$memory" "$count" 512 "$sweep"
done
# Hidden states in a file, and the control once more, for what the machine varies by.
run streamed "$dir" "$memory" "$tokens" 512 "$tokens" always
run resident "$dir" "$tokens"
