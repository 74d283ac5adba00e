#!/usr/bin/env bash
# MFPO on LLaVA-1.5-7B with adapters of rank 64, one GPU of 24 to 48 GB. The adapters are merged into final/.
#
#   SOURCE=RLHF-V-Dataset.parquet bash runs/llava15_7b_mfpo_1gpu_lora.sh
#
# Not yet run on a GPU. python bench.py plan --model 7b --gpus 1 --lora_rank 64 --per_gpu 1: 18 GB, 5.3 records/s at 40 %
# of an H100's peak (a 4090 has a sixth of it), so RLHF-V (5,733 records, two passes) in 36 minutes to 4 hours.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf} DATA=${DATA:-data/rlhfv}
GROUNDER=${GROUNDER-IDEA-Research/grounding-dino-base} SEGMENTER=${SEGMENTER-facebook/sam-vit-huge}
[ -f "$DATA/source.jsonl" ] || python -m extras.sources "$SOURCE" --out "$DATA" --images "${IMAGES:-}"
[ -f "$DATA/mfpo.jsonl" ] || python build_data.py mfpo --source "$DATA/source.jsonl" --model "$MODEL" --out "$DATA/mfpo.jsonl" \
    --grounder "$GROUNDER" --segmenter "$SEGMENTER" --batch 8 --schedule vcd --t 500 --heldout "${HELDOUT:-200}"
# Rank 64 and learning rate 1e-5: mDPO's; all else as in llava15_7b_mfpo_8gpu.sh.
python train_mfpo.py --model "$MODEL" --data "$DATA/mfpo.jsonl" --out "${OUT:-out/llava15_7b_mfpo_lora}" --lora_rank 64 \
    --beta 0.1 --learning_rate 1e-5 --warmup_steps 15 --epochs 2 --pairs_per_step 32 --pairs_per_gpu 1 --recompute True \
    --save_every 100 "$@"
