"""Fine-tune a LLaMA-class model on commonsense questions with adaptive ranks.

    accelerate launch recipes/llama_commonsense.py                                   a demonstration, no Hub needed
    accelerate launch recipes/llama_commonsense.py --config recipes/configs/llama_commonsense_llama_7b.yaml
    accelerate launch recipes/llama_commonsense.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_hub --tasks boolq piqa

Engines are chosen by the launcher, not here: add --config_file launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to
``accelerate launch``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.commonsense.config import COMMONSENSE_TASKS, CommonsenseConfig

ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "llama_commonsense_demo.yaml"


def configuration(argv: list[str]) -> CommonsenseConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    return parse_config(CommonsenseConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "")


def main(config: CommonsenseConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForCausalLM

    from adalora_dist.tasks.batches import BatchPlan, count_targets
    from adalora_dist.tasks.commonsense.choices import evaluate_choices
    from adalora_dist.tasks.commonsense.demo import demo_questions, demo_questions_folder
    from adalora_dist.tasks.commonsense.generation import evaluate_generation
    from adalora_dist.tasks.commonsense.prompts import check_questions, encode_examples
    from adalora_dist.tasks.commonsense.results import TaskResult
    from adalora_dist.tasks.commonsense.rows import load_tasks
    from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import accuracy_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        built_in, tasks = not config.data.source, config.data.tasks or COMMONSENSE_TASKS
        return dry_run(
            config, AutoModelForCausalLM, ARCHITECTURES, "SmolLM2-135M-Instruct", tasks,
            lambda: demo_questions("train") if built_in else load_tasks(config.data)[0],
        )  # fmt: skip
    run = Run(config)
    run.begin()

    # ------------------------------------------------------------------------------------------------------------- data
    own = "--data FOLDER, or --data hub for the eight tasks"
    run.demo_data("built-in questions", own, demo_questions_folder)
    data = run.config.data
    train_examples, eval_examples = load_tasks(data, run.bad_rows)
    run.report_bad_rows()
    sizes = ", ".join(f"{task} {len(examples)}" for task, examples in eval_examples.items())
    run.say(f"{len(train_examples)} training rows; evaluation: {sizes}")

    # ------------------------------------------------------------------------------------------------------------ model
    run.demo_model("SmolLM2-135M-Instruct, dequantised 4-bit weights", demo_model_folder)
    tokenizer = run.load_model(AutoModelForCausalLM)
    rows = encode_examples(train_examples, tokenizer, data.max_length, data.train_on)
    check_questions((row for part in eval_examples.values() for row in part), tokenizer, data.max_length)

    # ---------------------------------------------------------------------------------------------- adapters and engine
    run.prepare(BatchPlan.of_rows(rows, *run.batching))

    # --------------------------------------------------------------------------------------------------------- evaluate
    settings, synced = run.config.evaluation, run.generates_together()

    def evaluate() -> list[dict[str, Any]]:
        results = []
        for examples in eval_examples.values():
            common = (run.model, tokenizer, examples, settings.eval_batch_size, data.max_length)
            if "likelihood" in settings.evaluate_by:
                results.append(evaluate_choices(*common, **run.ranks))
            if "generation" in settings.evaluate_by:
                results.append(evaluate_generation(*common, settings.max_new_tokens, **run.ranks, synced_gpus=synced))
        return [vars(result) for result in results]

    columns = {"before": [], **run.notes}
    if run.evaluates_before:
        columns["before"] = evaluate()

    # ------------------------------------------------------------------------------------------------------------ train
    run.train(causal_loss(rows, padding_token(tokenizer), run.device, run.config.train.logits_chunk), columns)
    columns["after"] = evaluate()

    # ----------------------------------------------------------------------------------------------------------- export
    run.folder.write_json("results.json", columns)
    run.export(tokenizer, rows[0]["input_ids"], count_targets(rows[0]["labels"]) + 1, "a reply")

    # ----------------------------------------------------------------------------------------------------------- finish
    before, after = ([TaskResult(**result) for result in columns[when]] for when in ("before", "after"))
    run.finish(accuracy_table(before, after))
    run.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
