#!/usr/bin/env bash
# Trains the same student by every weighting and from every kind of cache, with several seeds, and writes a table.
#
#   benches/proof/run.sh OUT [--set key=value ...]
#
# OUT holds one run directory for each cell, the caches that they share, and in the end proof.csv (a line for each arm of each
# run) and proof.md (means over seeds with 95% intervals). Interrupted, it goes on where it was with the same command; a run that
# is finished is not done again. What is said after OUT is said to every run, such as other text or a larger student:
#   --set teacher.checkpoint=/models/SmolLM2-135M --set data.tokens=1.5M --set 'data.sources=[{ path = "/text/*.parquet" }]'
# LIMBECK is the program (default: target/release/limbeck); SEEDS, WEIGHTINGS and CACHES choose parts of the grid. JOBS=n trains n
# students at a time, each on its share of the processors and with a log of its own in OUT: more in all than one after the other,
# whose steps cannot all be shared out.
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
out=${1:?usage: benches/proof/run.sh OUT [--set key=value ...]}
shift
limbeck=${LIMBECK:-$root/target/release/limbeck}
recipe=$root/recipes/smollm2/proof.toml
seeds=${SEEDS:-1 2}
weightings=${WEIGHTINGS:-constant linear cosine wsd magnitude_match gradient_norm uncertainty teacher_confidence teacher_entropy student_gap taid llama4}
caches=${CACHES:-top_k sampled compact}
at_once=${JOBS:-1}
threads=$(($(nproc) / at_once))
[ "$threads" -gt 0 ] || threads=1
pids=()
# What runs in the background does not hear Ctrl-C, but is asked to stop like this, and keeps its state.
[ "$at_once" = 1 ] || trap 'trap - INT TERM; kill -TERM 0' INT TERM
mkdir -p "$out"
# Paths in --set are taken from the recipe's folder.
out=$(cd "$out" && pwd)

# What is kept of a prediction. Every cache but the first takes what it can from the first.
cache_keys() {
    case $1 in
    top_k) echo "--set cache.top_k=64" ;;
    sampled) echo "--set cache.selection={kind=\"threshold_sampled\"}" ;;
    compact) echo "--set cache.top_k=64 --set cache.codec=compact --set cache.reuse=[\"$out/caches/top_k\"]" ;;
    esac
}

weighting_keys() {
    case $1 in
    constant) echo "--set loss.weighting={kind=\"constant\",soft=0.7}" ;;
    linear | cosine | wsd) echo "--set loss.weighting={kind=\"$1\",from=0.9,to=0.5}" ;;
    taid) echo "--set loss.weighting={kind=\"taid\"} --set loss.divergence={kind=\"taid\",teacher=1.0}" ;;
    *) echo "--set loss.weighting={kind=\"$1\"}" ;;
    esac
}

# name, seed, cache, and what else is said
run() {
    local name=$1 seed=$2 cache=$3
    shift 3
    local dir=$out/$name-seed$seed
    [ -f "$dir/report.json" ] && return
    # shellcheck disable=SC2046 # several words are meant
    local command=("$limbeck" distill "$recipe" --run-dir "$dir" --set "cache.dir=$out/caches/$cache" $(cache_keys "$cache")
        --set "train.seed=$seed" --set "student.init_seed=$seed" "$@")
    if [ "$at_once" = 1 ]; then
        echo "== $name, seed $seed"
        "${command[@]}"
        return
    fi
    while [ "$(jobs -rp | wc -l)" -ge "$at_once" ]; do sleep 1; done
    echo "== $name, seed $seed: $dir.log"
    RAYON_NUM_THREADS=$threads "${command[@]}" >"$dir.log" 2>&1 || { echo "failed, see $dir.log" >&2; exit 1; } &
    pids+=($!)
}

# Students that are trained at a time find their caches finished.
for cache in top_k ${caches//top_k/}; do
    # shellcheck disable=SC2046
    "$limbeck" precompute-teacher-logits "$recipe" --run-dir "$out/caches/run" --set "cache.dir=$out/caches/$cache" \
        $(cache_keys "$cache") "$@"
done

for seed in $seeds; do
    # The control is trained once for a seed: no weighting and no cache has anything to do with it.
    run cosine-top_k "$seed" top_k $(weighting_keys cosine) --set control.enabled=true "$@"
    for weighting in $weightings; do
        [ "$weighting" = cosine ] || run "$weighting-top_k" "$seed" top_k $(weighting_keys "$weighting") "$@"
    done
    for cache in $caches; do
        [ "$cache" = top_k ] || run "cosine-$cache" "$seed" "$cache" $(weighting_keys cosine) "$@"
    done
done
failed=0
for pid in ${pids[@]+"${pids[@]}"}; do wait "$pid" || failed=1; done
[ $failed = 0 ]

runs=()
for report in "$out"/*/report.json; do runs+=("$(dirname "$report")"); done
"$limbeck" compare "${runs[@]}" --csv "$out/proof.csv" --html "$out/proof.html" >/dev/null
python3 "$root/benches/proof/summary.py" "$out/proof.csv" >"$out/proof.md"
cat "$out/proof.md"
