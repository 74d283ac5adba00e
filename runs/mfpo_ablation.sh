#!/usr/bin/env bash
# What each part of MFPO is worth, on the built-in world, over seeds: each seed has its own base model, preference scenes
# and order of records; all are measured on the same test scenes.
#
#   bash runs/mfpo_ablation.sh             seeds 0 1 2 3 4, about an hour on 2 cores; prints the tables of docs/results.md
#   bash runs/mfpo_ablation.sh --quick     seed 0 and 160 records: shows that it runs, not what a part is worth
#   SEEDS="0 1" ARMS="mfpo one_mix" SPLIT=val OUT=out/try EXTRA="--beta 0.1" bash runs/mfpo_ablation.sh
# What is done already is kept, so shells with other SEEDS may share the work.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2 3 4} OUT=${OUT:-out/mfpo_ablation} DATA=${DATA:-data} EXTRA=${EXTRA:-} prefix="" few=0
if [ "${1:-}" = --quick ]; then SEEDS=0 OUT=$OUT-quick EXTRA="--epochs 1 $EXTRA" prefix=quick_ few=160; fi

arm() { # name, region of the noise, flags of train_mfpo.py
    [[ -z "${ARMS:-}" || " $ARMS " == *" $1 "* ]] || return 0
    [ ! -f "$OUT/$1-$seed/eval.json" ] || return 0 # done before
    local records=$data/${prefix}mfpo_$2.jsonl
    [ -f "$records" ] || python build_data.py mfpo --source "$data/preference.jsonl" --model "$data/base" --out "$records" --region "$2" \
        --records "$few" --seed "$seed"
    rm -rf "${OUT:?}/$1-$seed"
    python train_mfpo.py --seed "$seed" --data "$records" --out "$OUT/$1-$seed" --eval_split "${SPLIT:-test}" "${@:3}" $EXTRA
}

for seed in $SEEDS; do
    data=$DATA/toy-$seed
    python build_data.py toy --out "$data" --seed "$seed"
    # The terms of the loss
    arm text_only key --image_weight 0 --margin_weight 0
    arm image_only key --text_weight 0 --margin_weight 0
    arm margin_only key --text_weight 0 --image_weight 0
    arm text_margin key --image_weight 0
    arm text_image key --margin_weight 0
    arm image_margin key --text_weight 0
    arm mfpo key
    # Where the noise goes
    arm random_region random
    arm global_region global
    # The order of the records
    arm one_mix key --curriculum none
    arm hard_to_easy key --curriculum hard_to_easy
    # Offset of the margin term, weights
    arm eta_1 key --eta 1
    arm image_half key --image_weight 0.5
    arm image_double key --image_weight 2
done
python eval.py runs "$OUT"
