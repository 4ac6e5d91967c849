"""Fine-tune a LLaMA-class model on commonsense questions with adaptive ranks.

    accelerate launch recipes/llama_commonsense.py                                   a demonstration, no Hub needed
    accelerate launch recipes/llama_commonsense.py --config recipes/configs/llama_commonsense_llama_7b.yaml
    accelerate launch recipes/llama_commonsense.py --model FOLDER_OR_HUB_ID --data FOLDER_OR_hub --tasks boolq piqa

Engines are chosen by the launcher, not here: add --config_file launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to
``accelerate launch``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.commonsense.config import COMMONSENSE_TASKS, CommonsenseConfig

ARCHITECTURES = CONFIGS / "architectures"
DEMO_CONFIG = CONFIGS / "llama_commonsense_demo.yaml"


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
    from adalora_dist.tasks.commonsense.results import TaskResult, as_scores
    from adalora_dist.tasks.commonsense.rows import Example, load_tasks_and_validation
    from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
    from adalora_dist.tasks.evaluation.loss import counts_of, validation_loss
    from adalora_dist.tasks.evaluation.shown import shown_texts
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import accuracy_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        built_in, tasks = not config.data.source, config.data.tasks or COMMONSENSE_TASKS
        validates = config.evaluation.eval_every > 0
        return dry_run(
            config, AutoModelForCausalLM, ARCHITECTURES, "SmolLM2-135M-Instruct", tasks,
            lambda: demo_questions("train") if built_in else load_tasks_and_validation(config.data, None, validates)[0],
        )  # fmt: skip
    run = Run(config)
    run.begin()

    # ------------------------------------------------------------------------------------------------------------- data
    own = "--data FOLDER_OR_FILE, or --data hub for the eight tasks"
    run.demo_data("built-in questions", own, demo_questions_folder)
    data = run.config.data
    train_examples, eval_examples, validation = load_tasks_and_validation(data, run.bad_rows, run.validates)
    run.report_bad_rows()
    held_out = [row for part in validation.values() for row in part]
    sizes = ", ".join(f"{task} {len(examples)}" for task, examples in eval_examples.items())
    run.say_sizes(f"{len(train_examples)} training rows; evaluation: {sizes}", held_out)

    # ------------------------------------------------------------------------------------------------------------ model
    run.demo_model("SmolLM2-135M-Instruct, dequantised 4-bit weights", demo_model_folder)
    tokenizer = run.load_model(AutoModelForCausalLM)
    with run.main_process_first():  # the others find its tokens in the cache
        rows = encode_examples(train_examples, tokenizer, data.max_length, data.train_on)
        for questions in (held_out, *eval_examples.values()):
            prompts = check_questions(questions, tokenizer, data.max_length)
            if "generation" in run.config.evaluation.evaluate_by:
                run.check_replies(prompts)

    # ---------------------------------------------------------------------------------------------- adapters and engine
    run.prepare(BatchPlan.of_rows(rows, *run.batching))

    # --------------------------------------------------------------------------------------------------------- evaluate
    settings, chunk, synced = run.config.evaluation, run.config.train.logits_chunk, run.generates_together()
    padding = padding_token(tokenizer)
    packed = run.packs(padding)

    def evaluate(questions: Mapping[str, Sequence[Example]], show: Any = None) -> list[TaskResult]:
        results = []
        for examples in questions.values():
            common = (run.model, tokenizer, examples, settings.eval_batch_size, data.max_length)
            if "likelihood" in settings.evaluate_by:
                results.append(evaluate_choices(*common, **run.ranks))
            if "generation" in settings.evaluate_by:
                decoding = run.ranks | {"synced_gpus": synced, "merge_to_generate": settings.merge_to_generate}
                results.append(evaluate_generation(*common, settings.max_new_tokens, **decoding, show=show))
        return results

    def show(examples: Sequence[Example], replies: Sequence[str]) -> None:
        asked = [f"{example.instruction} {example.input}" for example in examples]
        run.say(shown_texts(asked, replies, settings.show_samples))

    checked = encode_examples(held_out, tokenizer, data.max_length, data.train_on) if held_out else []
    checked_loss = causal_loss(checked, padding, run.device, chunk)

    def validate() -> dict[str, float]:
        size = settings.eval_batch_size
        loss = validation_loss(run.model, checked_loss, *counts_of(checked), size, **run.ranks)
        return loss | as_scores(evaluate(validation, show))

    columns: dict[str, Any] = {"before": [], **run.notes}
    if run.evaluates_before:
        columns["before"] = [vars(result) for result in evaluate(eval_examples)]

    # ------------------------------------------------------------------------------------------------------------ train
    run.train(causal_loss(rows, padding, run.device, chunk, packed), columns, validate)
    columns["after"] = [vars(result) for result in evaluate(eval_examples)]

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
