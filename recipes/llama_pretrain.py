"""Pre-train a LLaMA on your own text or C4: GaLore, ReLoRA, low-rank or full weights, by one flag.

    accelerate launch recipes/llama_pretrain.py                                      a demonstration, no Hub needed
    accelerate launch recipes/llama_pretrain.py --method relora                      the same; or low_rank, full, lora
    accelerate launch recipes/llama_pretrain.py --size 60m --data FILE_OR_FOLDER --num-tokens 1000000000
    accelerate launch recipes/llama_pretrain.py --config recipes/configs/llama_pretrain_60m.yaml     on C4, as published

docs/pretraining.md has the settings and what they need. Engines are chosen by the launcher, not here: add --config_file
launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to ``accelerate launch``, or run ``deepspeed launch/llama_pretrain.sh``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.pretrain.config import PretrainConfig

DEMO_CONFIG = CONFIGS / "llama_pretrain_demo.yaml"


def configuration(argv: list[str]) -> PretrainConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    return parse_config(PretrainConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "").with_steps()


def main(config: PretrainConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForCausalLM

    from adalora_dist.tasks.evaluation.loss import validation_loss
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.pretrain.fresh_model import fresh_model_folder, write_architecture
    from adalora_dist.tasks.pretrain.plan import WindowPlan
    from adalora_dist.tasks.pretrain.store import token_store
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        with tempfile.TemporaryDirectory() as folder:
            name, num_rows = write_architecture(config, Path(folder))
            return dry_run(config, AutoModelForCausalLM, Path(folder), name, ["own"], lambda: range(num_rows))
    run = Run(config)
    run.begin()

    # ------------------------------------------------------------------------------------------------- data and model
    run.demo_data("built-in stories of a village", "--data FILE_OR_FOLDER, or --data c4 (docs/pretraining.md)")
    size = config.model.size
    run.demo_model(f"a LLaMA of size {size} with random weights", lambda say: fresh_model_folder(run.config, say))
    tokenizer = run.load_model(AutoModelForCausalLM)
    train, length = run.config.train, run.config.data.max_length
    needed = None if train.max_steps is None else train.max_steps * train.batch_size * length
    with run.main_process_first():  # the others find it in the cache
        store = token_store(run.config.data, tokenizer, run.bad_rows, needed, run.is_main)
    run.report_bad_rows()
    run.say(f"{len(store.train):,} sequences of {length} tokens to train on, {len(store.held_out):,} to validate on")

    # ---------------------------------------------------------------------------------------------- method and engine
    run.prepare(WindowPlan(len(store.train), length, train.batch_size, train.seed, store.content))

    # ------------------------------------------------------------------------------------------------------- evaluate
    settings, padding = run.config.evaluation, padding_token(tokenizer)
    held_out_loss = causal_loss(store.held_out, padding, run.device, train.logits_chunk)
    counts = [length] * len(store.held_out), [length - 1] * len(store.held_out)

    def perplexity() -> dict[str, float]:
        return validation_loss(run.model, held_out_loss, *counts, settings.eval_batch_size, **run.ranks)

    found: dict[str, Any] = {"before": {}, **run.notes}
    if run.evaluates_before:
        found["before"] = perplexity()

    # ---------------------------------------------------------------------------------------------------------- train
    loss_sum = causal_loss(store.train, padding, run.device, train.logits_chunk)
    run.train(loss_sum, found, perplexity if run.validates else None)
    found["after"] = perplexity()

    # --------------------------------------------------------------------------------------------------------- export
    scores = {when: outcome for when, outcome in found.items() if outcome}
    run.folder.write_json("results.json", scores)
    run.export(tokenizer, store.held_out[0]["input_ids"], length, "a sequence")

    # --------------------------------------------------------------------------------------------------------- finish
    run.finish(metrics_table(scores), found["after"])
    run.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
