"""Fine-tune GPT-2, or another causal model, to say lists of facts in sentences, with adaptive ranks: E2E NLG.

    accelerate launch recipes/gpt2_e2e.py                                            a demonstration, no Hub needed
    accelerate launch recipes/gpt2_e2e.py --config recipes/configs/gpt2_e2e_medium.yaml
    accelerate launch recipes/gpt2_e2e.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_hub

Engines are chosen by the launcher, not here: add --config_file launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to
``accelerate launch``, or run ``deepspeed launch/gpt2_e2e.sh``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.e2e.config import E2EConfig

ARCHITECTURES = CONFIGS / "architectures"
DEMO_CONFIG = CONFIGS / "gpt2_e2e_demo.yaml"


def configuration(argv: list[str]) -> E2EConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    return parse_config(E2EConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "")


def main(config: E2EConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForCausalLM

    from adalora_dist.tasks.batches import BatchPlan, count_targets
    from adalora_dist.tasks.demo_models.pretrained import demo_gpt2_folder
    from adalora_dist.tasks.e2e.metrics import data_to_text_scores, missing_metrics
    from adalora_dist.tasks.e2e.rows import by_meaning, encode_rows, load_e2e_parts, prompt_tokens
    from adalora_dist.tasks.evaluation.loss import counts_of, validation_loss
    from adalora_dist.tasks.evaluation.shown import shown_texts
    from adalora_dist.tasks.evaluation.texts import generate_texts
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        validates = config.evaluation.eval_every > 0
        return dry_run(
            config, AutoModelForCausalLM, ARCHITECTURES, "demo-gpt2", ["e2e"],
            lambda: load_e2e_parts(config.data, None, validates)[0],
        )  # fmt: skip
    missing = missing_metrics()
    run = Run(config)
    run.begin()
    for metric, reason in missing.items():
        run.say(f"{metric} is left out: {reason}")

    # ------------------------------------------------------------------------------------------------------------ model
    run.demo_model("a tiny GPT-2, pre-trained here on built-in descriptions", demo_gpt2_folder)
    tokenizer = run.load_model(AutoModelForCausalLM)

    # ------------------------------------------------------------------------------------------------------------- data
    run.demo_data("built-in places", "--data FOLDER_OR_FILE, or --data hub for E2E NLG")
    data, settings = run.config.data, run.config.evaluation
    train_pairs, test_pairs, validation_pairs = load_e2e_parts(data, run.bad_rows, run.validates)
    run.report_bad_rows()
    with run.main_process_first():  # the others find it in the cache
        rows = encode_rows(train_pairs, tokenizer, data.max_length, run.is_main)
        checked = encode_rows(validation_pairs or [], tokenizer, data.max_length, run.is_main)
    references, validation = by_meaning(test_pairs), by_meaning(validation_pairs or [])
    sizes = f"{len(references):,} lists of facts with {len(test_pairs):,} references"
    run.say_sizes(f"{len(rows):,} training rows; evaluation: {sizes}", validation)
    run.check_replies(prompt_tokens([*references, *validation], tokenizer))

    # ---------------------------------------------------------------------------------------------- adapters and engine
    run.prepare(BatchPlan.of_rows(rows, *run.batching))

    # --------------------------------------------------------------------------------------------------------- evaluate
    synced, padding, chunk = run.generates_together(), padding_token(tokenizer), run.config.train.logits_chunk

    def evaluate(references: Mapping[str, list[str]]) -> tuple[dict[str, float], list[str]]:
        prompts = prompt_tokens(list(references), tokenizer)
        lengths = [len(prompt) for prompt in prompts]
        texts = generate_texts(run.model, tokenizer, prompts, lengths, settings, **run.ranks, synced_gpus=synced)
        return data_to_text_scores(texts, list(references.values())), texts

    checked_loss = causal_loss(checked, padding, run.device, chunk)

    def validate() -> dict[str, float]:
        size = settings.eval_batch_size
        loss = validation_loss(run.model, checked_loss, *counts_of(checked), size, **run.ranks)
        scores, texts = evaluate(validation)
        run.say(shown_texts(list(validation), texts, settings.show_samples))
        return loss | scores

    columns = run.notes
    if run.evaluates_before:
        columns["before"], _ = evaluate(references)

    # ------------------------------------------------------------------------------------------------------------ train
    run.train(causal_loss(rows, padding, run.device, chunk), columns, validate)
    columns["after"], texts = evaluate(references)

    # ----------------------------------------------------------------------------------------------------------- export
    run.folder.write_json("results.json", columns)
    run.folder.write_json("texts.json", texts)
    run.export(tokenizer, rows[0]["input_ids"], count_targets(rows[0]["labels"]) + 1, "a text")

    # ----------------------------------------------------------------------------------------------------------- finish
    shown, written = next(iter(references.items()))
    run.say("\nFacts: " + shown + "\nA reference: " + written[0] + "\nWritten now: " + texts[0].strip())
    run.finish(metrics_table(columns))
    run.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
