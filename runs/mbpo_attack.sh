#!/usr/bin/env bash
# How strong an attack should be: what the base model says about attacked scenes, over sizes and kinds of attack.
#
#   bash runs/mbpo_attack.sh              seeds 0 1 2, all test scenes; prints the table of the README
#   SEEDS=0 SPLIT=val bash runs/mbpo_attack.sh
set -euo pipefail
cd "$(dirname "$0")/.."
folders=""
for seed in ${SEEDS:-0 1 2}; do
    data=data/toy-$seed
    folders=$folders${folders:+,}$data
    python build_data.py toy --out "$data" --seed "$seed"
    rm -rf "$data"/attack_*
    for attack in pgd random; do
        for eps in 2 4 8 16; do
            python build_data.py mbpo --source "$data/${SPLIT:-test}.jsonl" --model "$data/base" --iig_keep 1 --questions 0 \
                --attack "$attack" --eps "$eps/255" --seed "$seed" --out "$data/attack_${attack}_$eps.jsonl"
        done
    done
done
python eval.py --mined "$folders"
