#!/usr/bin/env bash
# MFPO on LLaVA-1.5-7B, all weights but the vision tower's, 8 GPUs of 80 GB.
#
#   SOURCE=RLHF-V-Dataset.parquet bash runs/llava15_7b_mfpo_8gpu.sh
#
# SOURCE: RLHF-V's parquet, or any other preference data that extras/sources.py reads (IMAGES: where its paths start, if it
# holds paths). Keywords are found in the images by GROUNDER and SEGMENTER; GROUNDER= SEGMENTER= leaves records without
# boxes with global noise. DATA: where records and images go. 200 records are held out for the table at the end.
# Not yet run on GPUs. python bench.py plan --model 7b --gpus 8: memory 19 GB a GPU of state, gathered layers and
# activations; 33 records/s at 40 % of an H100's peak, so RLHF-V (5,733 records, two passes) in 6 minutes, and the
# reference pass in one more.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf} DATA=${DATA:-data/rlhfv} GPUS=${GPUS:-8}
GROUNDER=${GROUNDER-IDEA-Research/grounding-dino-base} SEGMENTER=${SEGMENTER-facebook/sam-vit-huge}
[ -f "$DATA/source.jsonl" ] || python -m extras.sources "$SOURCE" --out "$DATA" --images "${IMAGES:-}"
# t = 500: the paper's best; vcd: the schedule that this literature shares.
[ -f "$DATA/mfpo.jsonl" ] || torchrun --standalone --nproc_per_node="$GPUS" build_data.py mfpo --source "$DATA/source.jsonl" \
    --model "$MODEL" --out "$DATA/mfpo.jsonl" --grounder "$GROUNDER" --segmenter "$SEGMENTER" --batch 8 --schedule vcd --t 500 \
    --heldout "${HELDOUT:-200}"
# Paper: weights 1 : 1 : 1, eta 0, easy to hard. Peers (RLHF-V, RLAIF-V): beta 0.1 to 0.5, learning rate 5e-7, batch 32,
# cosine, warm-up of 3 to 5 %. Ours: two passes over each third.
torchrun --standalone --nproc_per_node="$GPUS" train_mfpo.py --model "$MODEL" --data "$DATA/mfpo.jsonl" \
    --out "${OUT:-out/llava15_7b_mfpo}" --beta 0.1 --learning_rate 5e-7 --warmup_steps 15 --epochs 2 --pairs_per_step 32 \
    --pairs_per_gpu 2 --recompute True --save_every 100 "$@"
