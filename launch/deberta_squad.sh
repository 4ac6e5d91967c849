#!/usr/bin/env bash
# DeBERTaV3 on SQuAD, or a demonstration, under DeepSpeed; see summarize_bart.sh.
#
#   deepspeed launch/deberta_squad.sh
#   deepspeed launch/deberta_squad.sh --preset paper --task v1.1 --budget 0.65%
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("deberta_squad")
