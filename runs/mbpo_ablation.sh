#!/usr/bin/env bash
# What each part of MBPO is worth, on the built-in world, over seeds: each seed has its own base model, scenes, questions
# and order; all are measured on the same test scenes.
#
#   bash runs/mbpo_ablation.sh             seeds 0 1 2 3 4, about an hour on 2 cores; prints the tables of docs/results.md
#   bash runs/mbpo_ablation.sh --quick     seed 0, 160 scenes and 40 steps: shows that it runs, not what a part is worth
#   SEEDS="0 1" ARMS="mbpo eps_8" SPLIT=val OUT=out/try EXTRA="--kl 0.04" bash runs/mbpo_ablation.sh
# What is done already is kept, so shells with other SEEDS may share the work.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2 3 4} OUT=${OUT:-out/mbpo_ablation} DATA=${DATA:-data} EXTRA=${EXTRA:-} prefix="" few=0
if [ "${1:-}" = --quick ]; then SEEDS=0 OUT=$OUT-quick EXTRA="--steps 40 $EXTRA" prefix=quick_ few=160; fi

arm() { # name, records, flags of train_mbpo.py
    [[ -z "${ARMS:-}" || " $ARMS " == *" $1 "* ]] || return 0
    [ ! -f "$OUT/$1-$seed/eval.json" ] || return 0 # done before
    local records=$data/${prefix}mbpo_$2.jsonl mining
    case $2 in
        pgd) mining="" ;;
        random | diffusion) mining="--attack $2" ;;
        all) mining="--iig_keep 1" ;;
        eps_8) mining="--eps 8/255" ;;
    esac
    [ -f "$records" ] || python build_data.py mbpo --source "$data/preference.jsonl" --model "$data/base" --out "$records" \
        --records "$few" --seed "$seed" $mining
    rm -rf "${OUT:?}/$1-$seed"
    python train_mbpo.py --seed "$seed" --data "$records" --out "$OUT/$1-$seed" --eval_split "${SPLIT:-test}" "${@:3}" $EXTRA
}

for seed in $SEEDS; do
    data=$DATA/toy-$seed
    python build_data.py toy --out "$data" --seed "$seed"
    # The mix
    arm offline_only pgd --online_fraction 0
    arm online_only pgd --online_fraction 1
    arm mbpo pgd
    # The attack, the choice by information gain
    arm random_noise random
    arm diffusion diffusion
    arm eps_8 eps_8
    arm no_gain all
    # Rewards and groups
    arm no_format pgd --format_reward 0
    arm no_length pgd --answer_words 1000
    arm group_4 pgd --group 4
    arm group_16 pgd --group 16
done
python eval.py runs "$OUT"
