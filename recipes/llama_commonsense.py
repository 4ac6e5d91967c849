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

from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.commonsense.config import COMMONSENSE_TASKS, CommonsenseConfig

ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "llama_commonsense_demo.yaml"


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(argv: list[str]) -> CommonsenseConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    given = {argument.partition("=")[0] for argument in argv}
    if not given & {"--config", "--model", "--data"}:
        argv = ["--config", str(DEMO_CONFIG), *argv]
    return parse_config(CommonsenseConfig, argv, __doc__ or "")


def main(config: CommonsenseConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from accelerate.utils import set_seed
    from transformers import AutoModelForCausalLM

    from adalora_dist.artifacts.hub.push import check_push_of_run, push_run
    from adalora_dist.backbones.load import load_backbone
    from adalora_dist.backbones.quantization import bitsandbytes_config
    from adalora_dist.methods.inject import inject_adapters
    from adalora_dist.tasks.batches import BatchPlan, count_targets
    from adalora_dist.tasks.commonsense.choices import evaluate_choices
    from adalora_dist.tasks.commonsense.demo import demo_questions, demo_questions_folder
    from adalora_dist.tasks.commonsense.generation import evaluate_generation
    from adalora_dist.tasks.commonsense.prompts import check_questions, encode_examples
    from adalora_dist.tasks.commonsense.results import TaskResult
    from adalora_dist.tasks.commonsense.rows import load_tasks
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.bad_rows import BadRows
    from adalora_dist.tasks.rows.public import count_rows
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.engine import build_accelerator, engine_name, start_trackers
    from adalora_dist.training.faults.guard import Guard
    from adalora_dist.training.finish import export_run
    from adalora_dist.training.loop import is_sharded, train
    from adalora_dist.training.prepared import prepare, total_steps
    from adalora_dist.training.report import accuracy_table, facts_line, rank_report, run_facts
    from adalora_dist.training.resume import find_checkpoint
    from adalora_dist.training.run_folder import RunFolder, refuse_used_folder
    from adalora_dist.training.verify import last_logits, logit_differences

    if config.train.dry_run:
        tasks = config.data.tasks or COMMONSENSE_TASKS
        built_in = not config.data.source
        num_rows = count_rows(
            config.data, tasks, lambda: demo_questions("train") if built_in else load_tasks(config.data)[0]
        )
        return dry_run(config, AutoModelForCausalLM, num_rows, ARCHITECTURES, "SmolLM2-135M-Instruct")
    refuse_used_folder(config)
    check_push_of_run(config)
    accelerator = build_accelerator(config.train)
    guard = Guard(accelerator, config)
    say, engine = accelerator.print, engine_name(accelerator)
    quantization = bitsandbytes_config(config, engine)
    set_seed(config.train.seed)
    resumed = find_checkpoint(config)
    if resumed is not None:
        say(f"Continuing after step {resumed.step} from {resumed.path}")

    # ------------------------------------------------------------------------------------------------------ data

    if not config.data.source:
        with accelerator.main_process_first():
            source = str(demo_questions_folder())
        say(f"Data: built-in questions ({source}). Your own: --data FOLDER, or --data hub for the eight tasks.")
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    bad_rows = BadRows(config.data.bad_rows)
    train_examples, eval_examples = load_tasks(config.data, bad_rows)
    if summary := bad_rows.summary():
        say(summary)
    say(
        f"{len(train_examples)} training rows; evaluation: "
        + ", ".join(f"{t} {len(r)}" for t, r in eval_examples.items())
    )

    # ------------------------------------------------------------------------------------------------------ model

    if not config.model.name:
        from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder

        with accelerator.main_process_first():
            name = str(demo_model_folder(say))
        say("Model: SmolLM2-135M-Instruct, dequantised 4-bit weights. Your own: --model FOLDER_OR_HUB_ID.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    model, tokenizer = load_backbone(config.model, AutoModelForCausalLM, quantization)
    rows = encode_examples(train_examples, tokenizer, config.data.max_length, config.data.train_on)
    check_questions((row for part in eval_examples.values() for row in part), tokenizer, config.data.max_length)
    plan = BatchPlan.of_rows(rows, config.train.batch_size, config.train.seed, config.train.group_by_length)
    num_steps = total_steps(config.train, plan)

    # --------------------------------------------------------------------------------------------------- adapters

    inject_adapters(model, config.adapter, config.train.seed)

    # ----------------------------------------------------------------------------------------------------- engine

    prepared = prepare(accelerator, model, config, num_steps, resumed)
    allocator = prepared.allocator
    facts = run_facts(config, engine, accelerator.num_processes, num_steps, prepared, bad_rows)
    folder = RunFolder(config, accelerator.is_main_process, facts, resumed)
    start_trackers(accelerator, config)
    say(facts_line(facts, allocator.schedule.freeze_step if allocator else None))

    # --------------------------------------------------------------------------------------------------- evaluate

    def evaluate() -> list:
        settings, unwrapped = config.evaluation, accelerator.unwrap_model(prepared.model)
        common = (settings.eval_batch_size, config.data.max_length)
        ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
        results = []
        for examples in eval_examples.values():
            if "likelihood" in settings.evaluate_by:
                results.append(evaluate_choices(unwrapped, tokenizer, examples, *common, **ranks))
            if "generation" in settings.evaluate_by:
                synced = is_sharded(accelerator) and accelerator.num_processes > 1
                results.append(
                    evaluate_generation(
                        unwrapped, tokenizer, examples, *common, settings.max_new_tokens, **ranks, synced_gpus=synced
                    )
                )
        return results

    if resumed is not None:
        before = [TaskResult(**result) for result in resumed.run["notes"]["before"]]
    else:
        before = evaluate() if config.evaluation.evaluate_before else []

    # ------------------------------------------------------------------------------------------------------ train

    loss_sum = causal_loss(rows, padding_token(tokenizer), accelerator.device)
    notes = {"before": [vars(result) for result in before]}
    train(accelerator, prepared, plan, loss_sum, config, folder, say, guard, notes)
    after = evaluate()

    # ----------------------------------------------------------------------------------------------------- export

    folder.write_json("results.json", {"before": [vars(r) for r in before], "after": [vars(r) for r in after]})
    if config.export.verifies_merged:  # on every process: where the model is sharded, forwards are collective
        probe, num_reply = rows[0]["input_ids"], count_targets(rows[0]["labels"])
        logits = last_logits(accelerator.unwrap_model(prepared.model), probe, num_reply + 1, accelerator.device)
    pattern = export_run(accelerator, prepared, config, tokenizer, folder)
    if accelerator.is_main_process and config.export.verifies_merged:
        difference = logit_differences(AutoModelForCausalLM, folder.path / "merged", probe, logits)
        folder.write_json("verification.json", difference.as_record(logits))
        say(difference.as_sentence("a reply", logits))
    accelerator.wait_for_everyone()

    say("\n" + accuracy_table(before, after))
    say(rank_report(prepared, pattern))
    say(folder.listing())
    accelerator.end_training()
    guard.close()
    if accelerator.is_main_process:  # no process group is left that could wait for the network
        push_run(config)


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
