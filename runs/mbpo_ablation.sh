#!/usr/bin/env bash
# What each part of MBPO is worth, on the built-in world, over seeds: each seed has its own base model, scenes, questions
# and order; all are measured on the same test scenes.
#
#   bash runs/mbpo_ablation.sh            seeds 0 1 2 3 4, about 50 minutes on 2 cores; prints the table of the README
#   SEEDS="0 1" SPLIT=val OUT=out/try EXTRA="--kl 0.04" bash runs/mbpo_ablation.sh
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/mbpo_ablation}
for seed in ${SEEDS:-0 1 2 3 4}; do
    data=data/toy-$seed
    python build_data.py toy --out "$data" --seed "$seed"
    mine() { # name, flags...
        [ -f "$data/$1.jsonl" ] || python build_data.py mbpo --source "$data/preference.jsonl" --model "$data/base" \
            --out "$data/$1.jsonl" --seed "$seed" "${@:2}"
    }
    mine mbpo
    mine mbpo_random --attack random
    mine mbpo_all --iig_keep 1
    train() { # name, flags...
        [ -f "$OUT/$1-$seed/eval.json" ] && return  # done before
        rm -rf "${OUT:?}/$1-$seed"
        python train_mbpo.py --seed "$seed" --out "$OUT/$1-$seed" --eval_split "${SPLIT:-test}" --data "$data" \
            "${@:2}" ${EXTRA:-}
    }
    train offline_only --online_fraction 0
    train online_only --online_fraction 1
    train mbpo
    train random_noise --data "$data/mbpo_random.jsonl"
    train no_gain --data "$data/mbpo_all.jsonl"
    train no_format --format_reward 0
done
python eval.py --runs "$OUT"
