#!/usr/bin/env bash
# MFPO, MBPO, and both in either order, on the built-in world, over seeds. The second method starts from the model of the
# first, which is also its reference, and MBPO attacks that model.
#
#   bash runs/both.sh             seeds 0 1 2 3 4, about 25 minutes on 2 cores; prints the table of docs/results.md
#   bash runs/both.sh --quick     seed 0, 160 scenes, few steps: shows that it runs
#   SEEDS="0 1" SPLIT=val OUT=out/try bash runs/both.sh
# What is done already is kept. (For the table in docs/results.md the runs of one method alone were taken from the
# ablations' folders: same seeds, records and flags, so the same bits.)
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2 3 4} OUT=${OUT:-out/both} DATA=${DATA:-data} prefix="" epochs=2 steps=300 few=0
if [ "${1:-}" = --quick ]; then SEEDS=0 OUT=$OUT-quick prefix=quick_ epochs=1 steps=40 few=160; fi

train() { # name, model, script, flags
    [ ! -f "$OUT/$1-$seed/eval.json" ] || return 0 # done before
    rm -rf "${OUT:?}/$1-$seed"
    python "$3" --seed "$seed" --model "$2" --out "$OUT/$1-$seed" --eval_split none "${@:4}"
    # Margins are measured against the base of both, not against the model that the second method starts from.
    python eval.py table --model "$OUT/$1-$seed/final" --base "$data/base" --data "$data" --split "${SPLIT:-test}" --json "$OUT/$1-$seed/eval.json"
}

mine() { # records, model
    [ -f "$1" ] || python build_data.py mbpo --source "$source" --model "$2" --out "$1" --records "$few" --seed "$seed"
}

for seed in $SEEDS; do
    data=$DATA/toy-$seed source=$DATA/toy-$seed/preference.jsonl
    python build_data.py toy --out "$data" --seed "$seed"
    pairs=$data/${prefix}both_pairs.jsonl mined=$data/${prefix}both_mined
    [ -f "$pairs" ] || python build_data.py mfpo --source "$source" --model "$data/base" --out "$pairs" --records "$few" --seed "$seed"
    [ -d "$OUT/mfpo-$seed" ] || rm -rf "${mined}_after_mfpo"* # of another run's model
    train mfpo "$data/base" train_mfpo.py --data "$pairs" --epochs "$epochs"
    mine "$mined.jsonl" "$data/base"
    train mbpo "$data/base" train_mbpo.py --data "$mined.jsonl" --steps "$steps"
    train mbpo_then_mfpo "$OUT/mbpo-$seed/final" train_mfpo.py --data "$pairs" --epochs "$epochs"
    mine "${mined}_after_mfpo.jsonl" "$OUT/mfpo-$seed/final"
    train mfpo_then_mbpo "$OUT/mfpo-$seed/final" train_mbpo.py --data "${mined}_after_mfpo.jsonl" --steps "$steps"
done
python eval.py runs "$OUT"
