#!/usr/bin/env bash
# Kill a run at random moments (kill -9), resume it, and compare the final weights with those of a run that was left alone.
#
#   bash runs/kill_test.sh                20 kills of MFPO on the built-in world, about 15 minutes on 2 cores
#   KILLS=4 SCRIPT=train_mbpo.py FLAGS="--steps 40 --groups_per_gpu 8" bash runs/kill_test.sh
set -euo pipefail
cd "$(dirname "$0")/.."
SCRIPT=${SCRIPT:-train_mfpo.py}
FLAGS=${FLAGS:---epochs 1 --curriculum none --pairs_per_step 64 --pairs_per_gpu 64}
OUT=out/kill_test
rm -rf "$OUT"
export OMP_NUM_THREADS=1  # another number of threads adds up in another order, so gives other bits
run() { python "$SCRIPT" "$@" --eval_split none > /dev/null 2>&1; }
run --out "$OUT/warm" $FLAGS  # builds what is missing, and the reference pass
began=$(date +%s%N)
run --out "$OUT/straight" $FLAGS
took=$(( ($(date +%s%N) - began) / 1000000 ))
same=0
for kill in $(seq "${KILLS:-20}"); do
    while true; do  # a kill before the run began, or after it ended, is no test: draw again
        rm -rf "${OUT:?}/$kill"
        python "$SCRIPT" --out "$OUT/$kill" --save_every 1 --eval_split none $FLAGS > "$OUT/log" 2>&1 &
        sleep "$(python -c "import random; print(random.uniform(0.3, 1.2) * $took / 1000)")"
        kill -9 $! 2> /dev/null || true
        wait $! 2> /dev/null || true
        [ -f "$OUT/$kill/config.json" ] && [ ! -d "$OUT/$kill/final" ] && break
    done
    step=$(ls -d "$OUT/$kill"/step_* 2> /dev/null | tail -1 || true)
    python "$SCRIPT" --resume "$OUT/$kill" > "$OUT/log" 2>&1 || tail -5 "$OUT/log"
    if cmp -s "$OUT/straight/final/model.safetensors" "$OUT/$kill/final/model.safetensors"; then
        same=$((same + 1)); echo "$kill: killed at ${step:-the beginning}: the same bits"
    else
        echo "$kill: killed at ${step:-the beginning}: DIFFERENT"
    fi
    rm -rf "${OUT:?}/$kill"
done
echo "$same of ${KILLS:-20} bit-exact"
[ "$same" = "${KILLS:-20}" ]
