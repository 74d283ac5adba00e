#!/usr/bin/env bash
# MFPO on LLaVA-1.5-13B, all weights but the vision tower's, 8 GPUs of 80 GB: the settings of 7B.
#
#   SOURCE=RLHF-V-Dataset.parquet bash runs/llava15_13b_mfpo_8gpu.sh
#
# Not yet run on GPUs. python bench.py plan --model 13b --gpus 8: 33 GB a GPU, 17 records/s at 40 % of an H100's peak, so
# RLHF-V (5,733 records, two passes) in 11 minutes, and the reference pass in two more.
export MODEL=${MODEL:-llava-hf/llava-1.5-13b-hf} OUT=${OUT:-out/llava15_13b_mfpo}
exec bash "$(dirname "$0")/llava15_7b_mfpo_8gpu.sh" "$@"
