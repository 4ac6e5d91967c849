#!/usr/bin/env bash
# GPT-2 on E2E NLG, or a demonstration, under DeepSpeed; see summarize_bart.sh.
#
#   deepspeed launch/gpt2_e2e.sh
#   deepspeed launch/gpt2_e2e.sh --config recipes/configs/gpt2_e2e_medium.yaml
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("gpt2_e2e")
