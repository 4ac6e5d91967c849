#!/usr/bin/env bash
# A LLaMA-class model on commonsense questions, or a demonstration, under DeepSpeed; see summarize_bart.sh.
#
#   deepspeed launch/llama_commonsense.sh
#   deepspeed launch/llama_commonsense.sh --config recipes/configs/llama_commonsense_llama_7b.yaml --deepspeed-config ds_configs/zero3.json
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("llama_commonsense")
