#!/usr/bin/env bash
# MFPO's curriculum three ways, on the built-in world, over seeds: one mix; easy to hard in one training (one cosine, the base
# as reference); easy to hard as three trainings, each with its own schedule and the last model as its reference ("iterative").
#
#   bash runs/curriculum.sh             seeds 5 6 7 8 9; prints the table of docs/results.md
#   bash runs/curriculum.sh --quick     seed 0 and 160 records: shows that it runs
#   SEEDS="5 6" SPLIT=val OUT=out/try bash runs/curriculum.sh
# What is done already is kept, so shells with other SEEDS may share the work.
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-5 6 7 8 9} OUT=${OUT:-out/curriculum} DATA=${DATA:-data} EXTRA=${EXTRA:-} few=0
if [ "${1:-}" = --quick ]; then ORDERS=none SEEDS=0 OUT=$OUT-quick EXTRA="--epochs 1 --pairs_per_step 8 $EXTRA" few=160; fi

train() { # name, flags of train_mfpo.py
    rm -rf "${OUT:?}/$1-$seed"
    python train_mfpo.py --seed "$seed" --out "$OUT/$1-$seed" "${@:2}" $EXTRA
}

thirds() { # cuts the records into <records>_1.jsonl (easy) to _3.jsonl (hard) by the entropy that a reference pass has stored
    python - "$1" "$OUT" <<'PYTHON'
import sys
from pathlib import Path
import numpy as np
import data, runtime
path = Path(sys.argv[1])
records = data.read_lines(path)
for ref in path.parent.glob("ref_*.jsonl"):
    entropy = {line["id"]: line.get("entropy") for line in data.read_lines(ref)}
    if set(entropy) == {record["id"] for record in records} and None not in entropy.values():
        break
else:
    sys.exit(f"{path}: no ref_*.jsonl beside it is of these records. Delete {sys.argv[2]} and start again")
ranked = np.argsort([entropy[record["id"]] for record in records], kind="stable")
for n, third in enumerate(np.array_split(ranked, 3), 1):
    runtime.write_jsonl(path.with_stem(f"{path.stem}_{n}"), [records[i] for i in third])
PYTHON
}

for seed in $SEEDS; do
    data=$DATA/toy-$seed
    records=$data/curriculum_$few.jsonl
    python build_data.py toy --out "$data" --seed "$seed"
    [ -f "$records" ] || python build_data.py mfpo --source "$data/preference.jsonl" --model "$data/base" --out "$records" \
        --records "$few" --seed "$seed"
    for order in ${ORDERS:-none easy_to_hard}; do
        [ -f "$OUT/$order-$seed/eval.json" ] || train "$order" --data "$records" --curriculum "$order" --eval_split "${SPLIT:-test}"
    done
    [ ! -f "$OUT/iterative-$seed/eval.json" ] || continue # done before
    thirds "$records"
    model=$data/base
    for n in 1 2 3; do
        name=iterative_$n
        [ "$n" != 3 ] || name=iterative
        train "$name" --data "${records%.jsonl}_$n.jsonl" --model "$model" --curriculum none --eval_split none
        model=$OUT/$name-$seed/final
    done
    python eval.py table --model "$model" --base "$data/base" --data "$data" --split "${SPLIT:-test}" --json "$OUT/iterative-$seed/eval.json"
done
python eval.py runs "$OUT"
