#!/usr/bin/env bash
# Which image negative teaches a model to look, on the built-in world, over seeds: where (--region) x what (--negative) x terms
# of the loss, with preference scenes as biased as the training scenes (as real preference data are) and with fair ones.
#
#   bash runs/negatives.sh             seeds 5 6 7 8 9, hours on 2 cores; prints the tables of docs/results.md
#   bash runs/negatives.sh --quick     seed 0 and 160 records, two arms: shows that it runs
#   SEEDS="5 6" SCENES=biased ARMS="prior_erase key_noise" TERMS=image_margin OUT=out/try bash runs/negatives.sh
# What is done already is kept, so shells with other SEEDS may share the work. Seeds 0 to 4 on validation scenes chose the arms.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-5 6 7 8 9} OUT=${OUT:-out/negatives} DATA=${DATA:-data} EXTRA=${EXTRA:-} few=0
if [ "${1:-}" = --quick ]; then
    SEEDS=0 OUT=$OUT-quick EXTRA="--epochs 1 $EXTRA" few=160 SCENES=biased ARMS="prior_erase crop" TERMS=image_margin
fi

world() { # scene: the same base model and held-out scenes for both, other preference scenes
    local data=$DATA/toy-$seed
    python build_data.py toy --out "$data" --seed "$seed"
    [ "$1" = biased ] || return 0
    mkdir -p "$data-biased"
    [ -d "$data-biased/base" ] || cp -r "$data/base" "$data-biased/base"
    python build_data.py toy --out "$data-biased" --seed "$seed" --preference_bias 0.87
}

run() { # name, records, flags of train_mfpo.py
    [ ! -f "$OUT/$1-$seed/eval.json" ] || return 0 # done before
    rm -rf "${OUT:?}/$1-$seed"
    python train_mfpo.py --seed "$seed" --data "$2" --out "$OUT/$1-$seed" --eval_split "${SPLIT:-test}" "${@:3}" $EXTRA
}

for scene in ${SCENES:-biased fair}; do
    for seed in $SEEDS; do world "$scene"; done
    for arm in ${ARMS:-key_noise prior_erase key_erase prior_noise crop other}; do
        for seed in $SEEDS; do
            data=$DATA/toy-$seed
            [ "$scene" = fair ] || data+=-biased
            records=$data/negatives_${arm}_$few.jsonl
            case $arm in # where and what; prior looks at all words of an answer (8 at most)
                crop | other) kind="--negative $arm" ;;
                *) kind="--region ${arm%_*} --negative ${arm#*_} --top 8" ;;
            esac
            [ -f "$records" ] || python build_data.py mfpo --source "$data/preference.jsonl" --model "$data/base" --out "$records" \
                --records "$few" --seed "$seed" $kind
            for terms in ${TERMS:-image_margin all_three}; do
                weights=""
                [ "$terms" = all_three ] || weights="--text_weight 0"
                run "${scene}_${arm}_$terms" "$records" $weights
            done
            if [ "$arm" = key_noise ]; then # without an image negative
                run "${scene}_margin" "$records" --text_weight 0 --image_weight 0
                run "${scene}_text_margin" "$records" --image_weight 0
            fi
        done
    done
done
python eval.py runs "$OUT"
