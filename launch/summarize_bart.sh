#!/usr/bin/env bash
# BART on XSum or CNN/DailyMail, or a demonstration, under DeepSpeed: bash and Python at once (adalora_dist/training/
# launch.py says why). Flags of the recipe follow; --deepspeed-config FILE replaces ds_configs/zero2.json.
#
#   deepspeed launch/summarize_bart.sh                             one process per GPU, or one on the CPU
#   deepspeed --num_accelerators 2 launch/summarize_bart.sh        two, also on the CPU
#   bash launch/summarize_bart.sh --preset paper --task xsum --budget 0.65% --data hub
''':'
command -v deepspeed > /dev/null || { echo "error: no deepspeed: pip install 'adalora-dist[deepspeed]'" >&2; exit 2; }
exec deepspeed --quiet "$0" "$@"
'''
from adalora_dist.training.launch import run_recipe

run_recipe("summarize_bart")
