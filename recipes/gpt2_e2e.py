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

from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.e2e.config import E2EConfig

ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "gpt2_e2e_demo.yaml"


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(argv: list[str]) -> E2EConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    given = {argument.partition("=")[0] for argument in argv}
    if not given & {"--config", "--model", "--data"}:
        argv = ["--config", str(DEMO_CONFIG), *argv]
    return parse_config(E2EConfig, argv, __doc__ or "")


def main(config: E2EConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from accelerate.utils import set_seed
    from transformers import AutoModelForCausalLM

    from adalora_dist.artifacts.hub.push import check_push_of_run, push_run
    from adalora_dist.backbones.load import load_backbone
    from adalora_dist.backbones.quantization import bitsandbytes_config
    from adalora_dist.methods.inject import adapt
    from adalora_dist.tasks.batches import BatchPlan, count_targets
    from adalora_dist.tasks.e2e.metrics import data_to_text_scores, missing_metrics
    from adalora_dist.tasks.e2e.rows import by_meaning, encode_rows, load_e2e, prompt_tokens
    from adalora_dist.tasks.evaluation.texts import generate_texts
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.bad_rows import BadRows
    from adalora_dist.tasks.rows.public import count_rows
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.engine import build_accelerator, engine_name, start_trackers
    from adalora_dist.training.faults.guard import Guard
    from adalora_dist.training.finish import export_run
    from adalora_dist.training.loop import generates_together, train
    from adalora_dist.training.prepared import prepare, total_steps
    from adalora_dist.training.report import facts_line, metrics_table, rank_report, run_facts
    from adalora_dist.training.resume import find_checkpoint
    from adalora_dist.training.run_folder import RunFolder, refuse_used_folder
    from adalora_dist.training.verify import last_logits, logit_differences

    if config.train.dry_run:
        num_rows = count_rows(config.data, ["e2e"], lambda: load_e2e(config.data, "train"))
        return dry_run(config, AutoModelForCausalLM, num_rows, ARCHITECTURES, "demo-gpt2")
    refuse_used_folder(config)
    check_push_of_run(config)
    missing = missing_metrics()
    accelerator = build_accelerator(config.train)
    guard = Guard(accelerator, config)
    say, engine = accelerator.print, engine_name(accelerator)
    quantization = bitsandbytes_config(config, engine)
    set_seed(config.train.seed)
    resumed = find_checkpoint(config)
    if resumed is not None:
        say(f"Continuing after step {resumed.step} from {resumed.path}")
    for metric, reason in missing.items():
        say(f"{metric} is left out: {reason}")

    # ------------------------------------------------------------------------------------------------------ model

    if not config.model.name:
        from adalora_dist.tasks.demo_models.pretrained import demo_gpt2_folder

        with accelerator.main_process_first():
            name = str(demo_gpt2_folder(say))
        say("Model: a tiny GPT-2, pre-trained here on built-in descriptions. Your own: --model FOLDER_OR_HUB_ID.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    model, tokenizer = load_backbone(config.model, AutoModelForCausalLM, quantization)

    # ------------------------------------------------------------------------------------------------------ data

    if not config.data.source:
        say("Data: built-in places. Your own: --data FOLDER, or --data hub for E2E NLG.")
    bad_rows = BadRows(config.data.bad_rows)
    with accelerator.main_process_first():  # the others find it in the cache
        rows = encode_rows(
            load_e2e(config.data, "train", bad_rows), tokenizer, config.data.max_length, accelerator.is_main_process
        )
    references = by_meaning(load_e2e(config.data, "test", bad_rows))
    if summary := bad_rows.summary():
        say(summary)
    prompts = prompt_tokens(list(references), tokenizer)
    num_references = sum(len(texts) for texts in references.values())
    say(f"{len(rows):,} training rows; evaluation: {len(prompts):,} lists of facts with {num_references:,} references")
    plan = BatchPlan.of_rows(rows, config.train.batch_size, config.train.seed, config.train.group_by_length)
    num_steps = total_steps(config.train, plan)

    # --------------------------------------------------------------------------------------------------- adapters

    adapt(model, config.adapter, config.train.seed)

    # ----------------------------------------------------------------------------------------------------- engine

    prepared = prepare(accelerator, model, config, num_steps, resumed)
    facts = run_facts(config, engine, accelerator.num_processes, num_steps, prepared, bad_rows)
    folder = RunFolder(config, accelerator.is_main_process, facts, resumed)
    start_trackers(accelerator, config)
    say(facts_line(facts, prepared.hooks.method_step.plan()))

    # --------------------------------------------------------------------------------------------------- evaluate

    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    synced = generates_together(accelerator, prepared.model)

    def evaluate() -> tuple[dict[str, float], list[str]]:
        unwrapped, lengths = accelerator.unwrap_model(prepared.model), [len(prompt) for prompt in prompts]
        texts = generate_texts(unwrapped, tokenizer, prompts, lengths, config.evaluation, **ranks, synced_gpus=synced)
        return data_to_text_scores(texts, list(references.values())), texts

    if resumed is not None:
        columns = resumed.run["notes"]
    else:
        columns = {"before": evaluate()[0]} if config.evaluation.evaluate_before else {}

    # ------------------------------------------------------------------------------------------------------ train

    loss_sum = causal_loss(rows, padding_token(tokenizer), accelerator.device)
    train(accelerator, prepared, plan, loss_sum, config, folder, say, guard, columns)
    columns["after"], texts = evaluate()

    # ----------------------------------------------------------------------------------------------------- export

    folder.write_json("results.json", columns)
    folder.write_json("texts.json", texts)
    if config.export.verifies_merged:  # on every process: where the model is sharded, forwards are collective
        probe, num_text = rows[0]["input_ids"], count_targets(rows[0]["labels"])
        logits = last_logits(accelerator.unwrap_model(prepared.model), probe, num_text + 1, accelerator.device)
    pattern = export_run(accelerator, prepared, config, tokenizer, folder)
    if accelerator.is_main_process and config.export.verifies_merged:
        difference = logit_differences(AutoModelForCausalLM, folder.path / "merged", probe, logits)
        folder.write_json("verification.json", difference.as_record(logits))
        say(difference.as_sentence("a text", logits))
    accelerator.wait_for_everyone()

    shown, written = next(iter(references.items()))
    say("\nFacts: " + shown + "\nA reference: " + written[0] + "\nWritten now: " + texts[0].strip())
    say("\n" + metrics_table(columns))
    say(rank_report(prepared, pattern))
    say(folder.listing())
    accelerator.end_training()
    guard.close()
    if accelerator.is_main_process:  # no process group is left that could wait for the network
        push_run(config)


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
