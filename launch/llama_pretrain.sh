#!/usr/bin/env bash
# A LLaMA from nothing, on C4, your own text or as a demonstration, under DeepSpeed; see summarize_bart.sh.
#
#   deepspeed launch/llama_pretrain.sh
#   deepspeed launch/llama_pretrain.sh --config recipes/configs/llama_pretrain_60m.yaml
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("llama_pretrain")
