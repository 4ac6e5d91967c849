"""Fine-tune GPT-2, or another causal model, to say lists of facts in sentences, with adaptive ranks: E2E NLG.

    accelerate launch recipes/gpt2_e2e.py                                            a demonstration, no Hub needed
    accelerate launch recipes/gpt2_e2e.py --config recipes/configs/gpt2_e2e_medium.yaml
    accelerate launch recipes/gpt2_e2e.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_hub

Engines are chosen by the launcher, not here: add --config_file launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to
``accelerate launch``, or run ``deepspeed launch/gpt2_e2e.sh``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.e2e.config import E2EConfig

ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "gpt2_e2e_demo.yaml"


def configuration(argv: list[str]) -> E2EConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    return parse_config(E2EConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "")


def main(config: E2EConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForCausalLM

    from adalora_dist.tasks.batches import BatchPlan, count_targets
    from adalora_dist.tasks.demo_models.pretrained import demo_gpt2_folder
    from adalora_dist.tasks.e2e.metrics import data_to_text_scores, missing_metrics
    from adalora_dist.tasks.e2e.rows import by_meaning, encode_rows, load_e2e, prompt_tokens
    from adalora_dist.tasks.evaluation.texts import generate_texts
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        return dry_run(
            config, AutoModelForCausalLM, ARCHITECTURES, "demo-gpt2", ["e2e"], lambda: load_e2e(config.data, "train")
        )
    missing = missing_metrics()
    run = Run(config)
    run.begin()
    for metric, reason in missing.items():
        run.say(f"{metric} is left out: {reason}")

    # ------------------------------------------------------------------------------------------------------------ model
    run.demo_model("a tiny GPT-2, pre-trained here on built-in descriptions", demo_gpt2_folder)
    tokenizer = run.load_model(AutoModelForCausalLM)

    # ------------------------------------------------------------------------------------------------------------- data
    run.demo_data("built-in places", "--data FOLDER, or --data hub for E2E NLG")
    data = run.config.data
    with run.main_process_first():  # the others find it in the cache
        rows = encode_rows(load_e2e(data, "train", run.bad_rows), tokenizer, data.max_length, run.is_main)
    references = by_meaning(load_e2e(data, "test", run.bad_rows))
    run.report_bad_rows()
    prompts = prompt_tokens(list(references), tokenizer)
    run.check_replies(prompts)
    num_references = sum(len(texts) for texts in references.values())
    run.say(
        f"{len(rows):,} training rows; evaluation: {len(prompts):,} lists of facts with {num_references:,} references"
    )

    # ---------------------------------------------------------------------------------------------- adapters and engine
    run.prepare(BatchPlan.of_rows(rows, *run.batching))

    # --------------------------------------------------------------------------------------------------------- evaluate
    lengths, synced = [len(prompt) for prompt in prompts], run.generates_together()

    def evaluate() -> tuple[dict[str, float], list[str]]:
        settings = run.config.evaluation
        texts = generate_texts(run.model, tokenizer, prompts, lengths, settings, **run.ranks, synced_gpus=synced)
        return data_to_text_scores(texts, list(references.values())), texts

    columns = run.notes
    if run.evaluates_before:
        columns["before"], _ = evaluate()

    # ------------------------------------------------------------------------------------------------------------ train
    run.train(causal_loss(rows, padding_token(tokenizer), run.device, run.config.train.logits_chunk), columns)
    columns["after"], texts = evaluate()

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
