#!/usr/bin/env bash
# The loss terms and the kinds of region of MFPO (its ablations), on the built-in world, over seeds: each seed has its own
# base model, preference scenes and order; all are measured on the same test scenes.
#
#   bash runs/mfpo_ablation.sh            seeds 0 1 2, about 20 to 25 minutes on 2 cores; prints the table of the README
#   SEEDS="0 1 2 3 4" SPLIT=val OUT=out/try EXTRA="--beta 0.1" bash runs/mfpo_ablation.sh
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/mfpo_ablation}
for seed in ${SEEDS:-0 1 2}; do
    data=data/toy-$seed
    python build_data.py toy --out "$data" --seed "$seed"
    for region in key random global; do
        name=mfpo; [ "$region" = key ] || name=mfpo_$region
        [ -f "$data/$name.jsonl" ] || python build_data.py mfpo --source "$data/preference.jsonl" --model "$data/base" \
            --out "$data/$name.jsonl" --region "$region" --seed "$seed"
    done
    train() { # name, flags...
        [ -f "$OUT/$1-$seed/eval.json" ] && return  # done before
        rm -rf "${OUT:?}/$1-$seed"
        python train_mfpo.py --seed "$seed" --out "$OUT/$1-$seed" --eval_split "${SPLIT:-test}" --data "$data" \
            "${@:2}" ${EXTRA:-}
    }
    train text_only --image_weight 0 --margin_weight 0
    train text_margin --image_weight 0
    train text_image --margin_weight 0
    train mfpo
    train random_region --data "$data/mfpo_random.jsonl"
    train global_region --data "$data/mfpo_global.jsonl"
done
python eval.py --runs "$OUT"
