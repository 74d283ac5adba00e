#!/usr/bin/env bash
# How strong an attack should be: what the base model says about attacked scenes, over sizes and kinds of attack.
#
#   bash runs/mbpo_attack.sh              seeds 0 1 2 3 4, all test scenes, about 8 minutes; prints the table of docs/results.md
#   bash runs/mbpo_attack.sh --quick      seed 0, two sizes: shows that it runs
#   SEEDS=0 EPS="4 6" SPLIT=val bash runs/mbpo_attack.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2 3 4} EPS=${EPS:-2 4 8 16} DATA=${DATA:-data} folders=""
if [ "${1:-}" = --quick ]; then SEEDS=0 EPS="4 8"; fi
for seed in $SEEDS; do
    data=$DATA/toy-$seed
    folders="$folders $data"
    python build_data.py toy --out "$data" --seed "$seed"
    rm -rf "$data"/attack_*
    for attack in pgd random; do
        for eps in $EPS; do
            python build_data.py mbpo --source "$data/${SPLIT:-test}.jsonl" --model "$data/base" --iig_keep 1 --questions 0 \
                --attack "$attack" --eps "$eps/255" --seed "$seed" --out "$data/attack_${attack}_$eps.jsonl"
        done
    done
done
python eval.py mined $folders
