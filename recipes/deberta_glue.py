"""Fine-tune an encoder on a GLUE task with adaptive ranks, and compare with LoRA, a trained head, or full fine-tuning.

    accelerate launch recipes/deberta_glue.py                                        a demonstration, no Hub needed
    accelerate launch recipes/deberta_glue.py --preset paper --task cola --budget 0.3M     the paper's set-up
    accelerate launch recipes/deberta_glue.py --preset paper --task cola --budget 0.3M --method lora --seeds 1 2 3
    accelerate launch recipes/deberta_glue.py --model FOLDER_OR_HUB_ID --data FOLDER --task rte

Presets are in recipes/configs/tables/deberta_glue.yaml; flags override what they set. Engines are chosen by the
launcher, not here: add --config_file launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to ``accelerate launch``.
"""

from __future__ import annotations

import sys
from functools import partial

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.errors import UserError
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.glue.config import GlueConfig

TABLE = CONFIGS / "tables" / "deberta_glue.yaml"
ARCHITECTURES = CONFIGS / "architectures"
DEMO_CONFIG = CONFIGS / "deberta_glue_demo.yaml"


def configuration(argv: list[str]) -> GlueConfig:
    """Flags over a YAML file over a preset. Without any of them, nor model or data, the demonstration's file."""
    return parse_config(GlueConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "", TABLE)


def main(config: GlueConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForSequenceClassification

    from adalora_dist.backbones.load import load_tokenizer
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder
    from adalora_dist.tasks.evaluation.predict import Outputs, largest_difference, predict
    from adalora_dist.tasks.glue.demo import TASK, demo_sentences, demo_sentences_folder
    from adalora_dist.tasks.glue.metrics import require_metrics
    from adalora_dist.tasks.glue.rows import TASKS, encode_texts, load_glue_rows
    from adalora_dist.tasks.glue.scores import majority_scores, score, validation_scores
    from adalora_dist.tasks.losses import classification_loss
    from adalora_dist.tasks.padding import refuse_uneven_ends
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run
    from adalora_dist.training.seeds import each_seed

    built_in, validates = not config.data.source, config.evaluation.eval_every > 0
    if config.train.dry_run:
        task = TASKS.get(config.data.task) or load_glue_rows(config.data).task
        return dry_run(
            config, AutoModelForSequenceClassification, ARCHITECTURES, "all-MiniLM-L6-v2", [config.data.task],
            lambda: demo_sentences("train") if built_in else load_glue_rows(config.data, None, validates).train,
            num_labels=task.num_labels,
        )  # fmt: skip
    require_metrics()
    if built_in and config.data.task != TASK:
        raise UserError(f"task={config.data.task} needs data: --data FOLDER or --data hub; built in is {TASK} only")
    whole = Run(config)

    # ------------------------------------------------------------------------------------------------------------- data
    whole.demo_data("built-in sentences, not SST-2", "--data FOLDER_OR_FILE, or --data hub", demo_sentences_folder)
    loaded = load_glue_rows(whole.config.data, whole.bad_rows, validates)
    task, train_examples, eval_examples = loaded.task, loaded.train, loaded.sets
    whole.report_bad_rows()
    sizes = ", ".join(f"{name} {len(examples)}" for name, examples in eval_examples.items())
    whole.say_sizes(f"{len(train_examples)} training rows; evaluation: {sizes}", loaded.validation)

    # ----------------------------------------------------------------------------------------------------------- tokens
    whole.demo_model("all-MiniLM-L6-v2, 22.7 million parameters", demo_encoder_folder)
    tokenizer = load_tokenizer(whole.config.model)
    padding, common = padding_token(tokenizer), (tokenizer, config.data.max_length)
    with whole.main_process_first():  # the others find it in the cache
        inputs = encode_texts(train_examples, *common, "tokenise train", whole.is_main)
        eval_inputs = {n: encode_texts(e, *common, f"tokenise {n}", whole.is_main) for n, e in eval_examples.items()}
        checked = encode_texts(loaded.validation or [], *common, "tokenise validation", whole.is_main)
    labels = [example.label for example in train_examples]
    eval_labels = {name: [example.label for example in examples] for name, examples in eval_examples.items()}
    majority = {"majority": majority_scores(task, eval_labels)}

    # --------------------------------------------------------------------------------------------------------- evaluate
    def evaluate(run: Run[GlueConfig]) -> tuple[dict[str, float], dict[str, Outputs]]:
        scores: dict[str, float] = {}
        logits: dict[str, Outputs] = {}
        for name, rows in eval_inputs.items():
            size = run.config.evaluation.eval_batch_size
            logits[name] = predict(run.model, rows, padding, size, **run.ranks, description=name)
            scores |= score(name, task, logits[name], eval_labels[name])
        return scores, logits

    def validate(run: Run[GlueConfig]) -> dict[str, float]:
        size = run.config.evaluation.eval_batch_size
        logits = predict(run.model, checked, padding, size, **run.ranks, description="validation")
        return validation_scores(task, logits, [example.label for example in loaded.validation or []])

    for run in each_seed(whole, majority):
        # -------------------------------------------------------------------------------------------------------- model
        changes = task.settings
        if config.model.classifier_dropout is not None:  # BERT's name for it, and DeBERTa's
            changes |= dict.fromkeys(("classifier_dropout", "cls_dropout"), config.model.classifier_dropout)
        run.load_model(AutoModelForSequenceClassification, changes)
        refuse_uneven_ends(run.model, {"training": inputs, "validation": checked, **eval_inputs})

        # ------------------------------------------------------------------------------------------ adapters and engine
        run.prepare(BatchPlan.of_inputs(inputs, [[label] for label in labels], *run.batching))
        columns = run.notes
        if run.evaluates_before:
            columns["before"], _ = evaluate(run)

        # -------------------------------------------------------------------------------------------------------- train
        loss = classification_loss(inputs, labels, task.num_labels, padding, run.device)
        run.train(loss, columns, partial(validate, run))
        columns["after"], logits = evaluate(run)

        # ------------------------------------------------------------------------------------------------------- export
        run.export(tokenizer)
        if run.verifies_here:
            (name, rows), size = next(iter(eval_inputs.items())), run.config.evaluation.eval_batch_size
            again = predict(run.merged_model(), rows, padding, size, description="merged", gather=list)
            columns["merged"] = score(name, task, again, eval_labels[name])
            run.report_difference(largest_difference(again, logits[name]))
        run.folder.write_json("results.json", columns)

        # ------------------------------------------------------------------------------------------------------- finish
        run.finish(metrics_table({**majority, **columns}), columns["after"])
    whole.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
