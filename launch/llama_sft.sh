#!/usr/bin/env bash
# A causal model on your own texts, or a demonstration, under DeepSpeed; see summarize_bart.sh.
#
#   deepspeed launch/llama_sft.sh
#   deepspeed launch/llama_sft.sh --model FOLDER_OR_HUB_ID --data FILE_OR_FOLDER_OR_hub:ID
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("llama_sft")
