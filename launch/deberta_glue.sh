#!/usr/bin/env bash
# DeBERTaV3 on a GLUE task, or a demonstration, under DeepSpeed; see summarize_bart.sh.
#
#   deepspeed launch/deberta_glue.sh
#   deepspeed launch/deberta_glue.sh --preset paper --task cola --budget 0.3M
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("deberta_glue")
