#!/usr/bin/env bash
# How strong MFPO's noise should be (the paper sweeps the diffusion step and finds 500 best; its schedule is unknown): both
# schedules over sqrt(abar_t), the share of the image that is left, which makes them comparable. Built-in world, over seeds.
#
#   bash runs/noise_sweep.sh              seeds 0 1 2 3 4, about 45 minutes on 2 cores; prints a table like that of docs/results.md (3 seeds, 3 more points)
#   bash runs/noise_sweep.sh --quick      seed 0 and 160 records: shows that it runs
#   SEEDS=0 POINTS="ddpm:400 vcd:500" SPLIT=val OUT=out/try bash runs/noise_sweep.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SEEDS=${SEEDS:-0 1 2 3 4} OUT=${OUT:-out/noise_sweep} DATA=${DATA:-data} EXTRA=${EXTRA:-} few=0
if [ "${1:-}" = --quick ]; then SEEDS=0 OUT=$OUT-quick EXTRA="--epochs 1 $EXTRA" few=160; fi
for seed in $SEEDS; do
    data=$DATA/toy-$seed
    python build_data.py toy --out "$data" --seed "$seed"
    for point in ${POINTS:-ddpm:0 vcd:500 ddpm:200 ddpm:300 ddpm:400 vcd:999 ddpm:500 ddpm:999}; do
        schedule=${point%:*} t=${point#*:}
        left=$(python -c "import build_data; print(f'{build_data.sqrt_alpha_bar(\"$schedule\")[$t]:.3f}')")
        run=$OUT/${left}_${schedule}_$t-$seed
        [ -f "$run/eval.json" ] && continue # done before
        rm -rf "$run"
        python build_data.py mfpo --source "$data/preference.jsonl" --model "$data/base" --out "$data/noise.jsonl" \
            --records "$few" --schedule "$schedule" --t "$t" --seed "$seed"
        python train_mfpo.py --seed "$seed" --out "$run" --eval_split "${SPLIT:-test}" --data "$data/noise.jsonl" $EXTRA
    done
done
python eval.py runs "$OUT"
echo "draw it: python -m extras.pictures curves --runs $OUT --out $OUT/sweep.png   (pip install matplotlib)"
