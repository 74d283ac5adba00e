#!/usr/bin/env bash
# MBPO on LLaVA-1.5-7B, all weights but the vision tower's, 8 GPUs of 80 GB. The paper tuned Qwen2-VL; this is ours.
#
#   SOURCE=RLHF-V-Dataset.parquet QUESTIONS=data/sqa/questions.jsonl bash runs/llava15_7b_mbpo_8gpu.sh
#
# SOURCE: answers to learn from, in any form that extras/sources.py reads (IMAGES: where its paths start).
# QUESTIONS: about 2,000 closed-ended ones: python -m extras.sources <ScienceQA, AI2D, MMStar or MME> --out data/sqa --records 2000
# Not yet run on GPUs. python bench.py plan --model 7b --gpus 8: 30 GB a GPU, most of it while sampling, and 55 groups/s
# at 40 % of an H100's peak, which sampling token by token will not reach: plan for a third. 300 steps of 32 groups: 9
# minutes then. Mining costs 14 forward and 10 backward passes a record (2 forward if it is not chosen), and its answer token by token.
set -euo pipefail
cd "$(dirname "$0")/.."
MODEL=${MODEL:-llava-hf/llava-1.5-7b-hf} DATA=${DATA:-data/rlhfv} GPUS=${GPUS:-8}
[ -f "$DATA/source.jsonl" ] || python -m extras.sources "$SOURCE" --out "$DATA" --images "${IMAGES:-}"
# eps, alpha, steps: ours (measured on the built-in world); half of the records by gain: ours; G = 8, clip 0.2: peers.
[ -f "$DATA/mbpo.jsonl" ] || torchrun --standalone --nproc_per_node="$GPUS" build_data.py mbpo --source "$DATA/source.jsonl" \
    --model "$MODEL" --out "$DATA/mbpo.jsonl" --eps 4/255 --alpha 1/255 --steps 10 --iig_keep 0.5 --max_new_tokens 512 --batch 4
# Learning rate 1e-6: peers' GRPO on vision models. KL 0.2 instead of their 0.04: on the built-in world 0.04 costs recall.
torchrun --standalone --nproc_per_node="$GPUS" train_mbpo.py --model "$MODEL" --data "$DATA/mbpo.jsonl" --questions "$QUESTIONS" \
    --out "${OUT:-out/llava15_7b_mbpo}" --learning_rate 1e-6 --steps 300 --groups_per_step 32 --groups_per_gpu 2 --recompute True \
    --save_every 100 "$@"
