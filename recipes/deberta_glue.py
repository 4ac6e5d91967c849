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
from pathlib import Path
from typing import Any

from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.errors import UserError
from adalora_dist.tasks.glue.config import GlueConfig

TABLE = Path(__file__).parent / "configs" / "tables" / "deberta_glue.yaml"
ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "deberta_glue_demo.yaml"


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(argv: list[str]) -> GlueConfig:
    """Flags over a YAML file over a preset. Without any of them, nor model or data, the demonstration's file."""
    given = {argument.partition("=")[0] for argument in argv}
    if not given & {"--config", "--preset", "--model", "--data"}:
        argv = ["--config", str(DEMO_CONFIG), *argv]
    return parse_config(GlueConfig, argv, __doc__ or "", TABLE)


def main(config: GlueConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from accelerate.utils import set_seed
    from transformers import AutoModelForSequenceClassification

    from adalora_dist.artifacts.hub.push import check_push_of_run, push_run
    from adalora_dist.backbones.load import load_backbone, load_tokenizer
    from adalora_dist.backbones.quantization import bitsandbytes_config
    from adalora_dist.methods.inject import inject_adapters
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.evaluation.predict import largest_difference, predict
    from adalora_dist.tasks.glue.demo import TASK, demo_sentences, demo_sentences_folder
    from adalora_dist.tasks.glue.metrics import require_metrics
    from adalora_dist.tasks.glue.rows import TASKS, encode_texts, load_glue
    from adalora_dist.tasks.glue.scores import score
    from adalora_dist.tasks.losses import classification_loss
    from adalora_dist.tasks.padding import refuse_uneven_ends
    from adalora_dist.tasks.rows.bad_rows import BadRows
    from adalora_dist.tasks.rows.public import count_rows
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.engine import build_accelerator, engine_name, start_trackers
    from adalora_dist.training.faults.guard import Guard
    from adalora_dist.training.finish import export_run
    from adalora_dist.training.loop import train
    from adalora_dist.training.prepared import prepare, total_steps
    from adalora_dist.training.report import facts_line, metrics_table, rank_report, run_facts
    from adalora_dist.training.resume import find_checkpoint
    from adalora_dist.training.run_folder import RunFolder, refuse_used_folder
    from adalora_dist.training.seeds import run_seeds
    from adalora_dist.training.verify import load_plainly

    if config.train.dry_run:
        num_rows = count_rows(
            config.data,
            [config.data.task],
            lambda: load_glue(config.data)[0] if config.data.source else demo_sentences("train"),
        )
        auto_class, num_labels = AutoModelForSequenceClassification, TASKS[config.data.task].num_labels
        return dry_run(config, auto_class, num_rows, ARCHITECTURES, "all-MiniLM-L6-v2", num_labels=num_labels)
    require_metrics()
    refuse_used_folder(config)
    check_push_of_run(config)
    accelerator = build_accelerator(config.train)
    guard = Guard(accelerator, config)
    say, engine = accelerator.print, engine_name(accelerator)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    quantization = bitsandbytes_config(config, engine)

    # ------------------------------------------------------------------------------------------------------ data

    if not config.data.source:
        if config.data.task != TASK:
            raise UserError(f"task={config.data.task} needs data: --data FOLDER or --data hub; built in is {TASK} only")
        sentences = demo_sentences_folder()
        say(f"Data: built-in sentences, not SST-2 ({sentences}). Your own: --data FOLDER, or --data hub.")
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": str(sentences)})})
    task = TASKS[config.data.task]
    bad_rows = BadRows(config.data.bad_rows)
    train_examples, eval_examples = load_glue(config.data, bad_rows)
    if summary := bad_rows.summary():
        say(summary)
    say(
        f"{len(train_examples)} training rows; evaluation: "
        + ", ".join(f"{n} {len(e)}" for n, e in eval_examples.items())
    )

    # --------------------------------------------------------------------------------------------- model and tokens

    if not config.model.name:
        from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder

        with accelerator.main_process_first():
            name = str(demo_encoder_folder(say))
        say("Model: all-MiniLM-L6-v2, 22.7 million parameters. Your own: --model FOLDER_OR_HUB_ID.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    problem_type = "regression" if task.num_labels == 1 else None
    changes: dict[str, Any] = {"num_labels": task.num_labels, "problem_type": problem_type}
    if config.model.classifier_dropout is not None:  # BERT's name for it, and DeBERTa's
        changes |= dict.fromkeys(("classifier_dropout", "cls_dropout"), config.model.classifier_dropout)

    tokenizer = load_tokenizer(config.model)
    padding = padding_token(tokenizer)
    with accelerator.main_process_first():  # the others find it in the cache
        common = (tokenizer, config.data.max_length)
        show = accelerator.is_main_process
        inputs = encode_texts(train_examples, *common, "tokenise train", show)
        eval_inputs = {n: encode_texts(e, *common, f"tokenise {n}", show) for n, e in eval_examples.items()}
    labels = [example.label for example in train_examples]
    eval_labels = {name: [example.label for example in examples] for name, examples in eval_examples.items()}
    majority: dict[str, float] = {}
    for name, values in eval_labels.items():
        most_frequent = max(sorted(set(values)), key=values.count)
        majority |= score(name, task, most_frequent, values)

    def one_run(config: GlueConfig) -> dict[str, float]:
        """Train and evaluate with one seed; the scores at the end."""
        set_seed(config.train.seed)
        resumed = find_checkpoint(config)
        if resumed is not None:
            say(f"Continuing after step {resumed.step} from {resumed.path}")
        model, _ = load_backbone(config.model, AutoModelForSequenceClassification, quantization, changes)
        refuse_uneven_ends(model, {"training": inputs, **eval_inputs})
        settings = (config.train.batch_size, config.train.seed, config.train.group_by_length)
        plan = BatchPlan.of_inputs(inputs, [[label] for label in labels], *settings)
        num_steps = total_steps(config.train, plan)

        # --------------------------------------------------------------------------------------- adapters, engine

        inject_adapters(model, config.adapter, config.train.seed)
        prepared = prepare(accelerator, model, config, num_steps, resumed)
        allocator = prepared.allocator
        facts = run_facts(config, engine, accelerator.num_processes, num_steps, prepared, bad_rows)
        folder = RunFolder(config, accelerator.is_main_process, facts, resumed)
        start_trackers(accelerator, config)
        say(facts_line(facts, allocator.schedule.freeze_step if allocator else None))

        # ----------------------------------------------------------------------------------------------- evaluate

        def evaluate() -> tuple[dict[str, float], dict[str, list]]:
            scores: dict[str, float] = {}
            logits: dict[str, list] = {}
            unwrapped, size = accelerator.unwrap_model(prepared.model), config.evaluation.eval_batch_size
            for name, rows in eval_inputs.items():
                logits[name] = predict(unwrapped, rows, padding, size, **ranks, description=name)
                scores |= score(name, task, logits[name], eval_labels[name])
            return scores, logits

        if resumed is not None:
            columns = resumed.run["notes"]
        else:
            columns = {"before": evaluate()[0]} if config.evaluation.evaluate_before else {}

        # -------------------------------------------------------------------------------------------------- train

        loss_sum = classification_loss(inputs, labels, task.num_labels, padding, accelerator.device)
        train(accelerator, prepared, plan, loss_sum, config, folder, say, guard, columns)
        columns["after"], logits = evaluate()

        # ------------------------------------------------------------------------------------------------- export

        pattern = export_run(accelerator, prepared, config, tokenizer, folder)
        if accelerator.is_main_process and config.export.verifies_merged:
            plain = load_plainly(AutoModelForSequenceClassification, folder.path / "merged")
            (name, rows), size = next(iter(eval_inputs.items())), config.evaluation.eval_batch_size
            again = predict(plain, rows, padding, size, description="merged", gather=list)
            columns["merged"] = score(name, task, again, eval_labels[name])
            far = largest_difference(again, logits[name])
            folder.write_json("verification.json", {"largest_logit_difference": far})
            say(f"Merged model in plain transformers: logits differ from the trained model's by up to {far:.1e}")
        folder.write_json("results.json", columns)
        accelerator.wait_for_everyone()

        say("\n" + metrics_table({"majority": majority, **columns}))
        say(rank_report(prepared, pattern))
        say(folder.listing())
        return columns["after"]

    # ------------------------------------------------------------------------------------------------------- seeds

    run_seeds(accelerator, config, one_run, {"majority": majority})
    accelerator.end_training()
    guard.close()
    if accelerator.is_main_process:  # no process group is left that could wait for the network
        push_run(config)


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
