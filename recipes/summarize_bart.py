"""Fine-tune BART, or another encoder-decoder, to write summaries, with adaptive ranks.

    deepspeed launch/summarize_bart.sh                        a demonstration, no Hub needed
    deepspeed launch/summarize_bart.sh --preset paper --task xsum --budget 0.65% --data hub
    deepspeed launch/summarize_bart.sh --model FOLDER_OR_HUB_ID --data FOLDER_OR_hub --task cnn_dailymail

DeepSpeed is the launch script's doing; this file runs under every engine: ``accelerate launch [--config_file
launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml] recipes/summarize_bart.py`` takes the same flags.
"""

from __future__ import annotations

import sys
from pathlib import Path

from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.summarization.config import SummarizationConfig

TABLE = Path(__file__).parent / "configs" / "tables" / "summarize_bart.yaml"
ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "summarize_bart_demo.yaml"


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(argv: list[str]) -> SummarizationConfig:
    """Flags over a YAML file over a preset. Without any of them, nor model or data, the demonstration's file."""
    given = {argument.partition("=")[0] for argument in argv}
    if not given & {"--config", "--preset", "--model", "--data"}:
        argv = ["--config", str(DEMO_CONFIG), *argv]
    return parse_config(SummarizationConfig, argv, __doc__ or "", TABLE)


def main(config: SummarizationConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from accelerate.utils import set_seed
    from transformers import AutoModelForSeq2SeqLM

    from adalora_dist.artifacts.hub.push import check_push_of_run, push_run
    from adalora_dist.backbones.load import load_backbone
    from adalora_dist.backbones.quantization import bitsandbytes_config
    from adalora_dist.methods.inject import adapt
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.evaluation.rouge import rouge_scorer, rouge_scores
    from adalora_dist.tasks.evaluation.texts import generate_texts
    from adalora_dist.tasks.losses import decoder_start_token, seq2seq_loss
    from adalora_dist.tasks.rows.bad_rows import BadRows
    from adalora_dist.tasks.rows.public import count_rows
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.tasks.summarization.rows import digest_of_summaries, encode_summaries, load_summaries
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
        num_rows = count_rows(config.data, [config.data.task], lambda: load_summaries(config.data)["train"])
        return dry_run(config, AutoModelForSeq2SeqLM, num_rows, ARCHITECTURES, "demo-bart")
    refuse_used_folder(config)
    check_push_of_run(config)
    rouge_scorer()  # now, not after training
    accelerator = build_accelerator(config.train)
    guard = Guard(accelerator, config)
    say, engine = accelerator.print, engine_name(accelerator)
    quantization = bitsandbytes_config(config, engine)
    set_seed(config.train.seed)
    resumed = find_checkpoint(config)
    if resumed is not None:
        say(f"Continuing after step {resumed.step} from {resumed.path}")

    # ------------------------------------------------------------------------------------------------------ model

    if not config.model.name:
        from adalora_dist.tasks.demo_models.pretrained import demo_bart_folder

        with accelerator.main_process_first():
            name = str(demo_bart_folder(say))
        say("Model: a tiny BART, pre-trained here on built-in reports. Your own: --model FOLDER_OR_HUB_ID.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    model, tokenizer = load_backbone(config.model, AutoModelForSeq2SeqLM, quantization)

    # ------------------------------------------------------------------------------------------------------ data

    if not config.data.source:
        say("Data: built-in reports. Your own: --data FOLDER, or --data hub for XSum and CNN/DailyMail.")
    bad_rows = BadRows(config.data.bad_rows)
    with accelerator.main_process_first():  # the others find its work in the cache
        splits = load_summaries(config.data, bad_rows)
        train_rows, eval_rows = (encode_summaries(splits[name], tokenizer, config.data) for name in ("train", "test"))
    if summary := bad_rows.summary():
        say(summary)
    say(f"{len(train_rows):,} training rows, {len(eval_rows):,} evaluation rows")
    settings = (config.train.batch_size, config.train.seed, config.train.group_by_length)
    lengths = [sum(pair) for pair in zip(train_rows["num_source"][:], train_rows["num_targets"][:], strict=True)]
    plan = BatchPlan(lengths, train_rows["num_targets"][:], *settings, digest_of_summaries(train_rows))
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
        unwrapped, lengths = accelerator.unwrap_model(prepared.model), eval_rows["num_source"][:]
        sources = eval_rows["input_ids"]
        texts = generate_texts(unwrapped, tokenizer, sources, lengths, config.evaluation, **ranks, synced_gpus=synced)
        return rouge_scores(texts, eval_rows["summary"], **ranks), texts

    if resumed is not None:
        columns = resumed.run["notes"]
    else:
        columns = {"before": evaluate()[0]} if config.evaluation.evaluate_before else {}

    # ------------------------------------------------------------------------------------------------------ train

    padding, start = padding_token(tokenizer), decoder_start_token(model)
    loss_sum = seq2seq_loss(train_rows, padding, start, accelerator.device)
    train(accelerator, prepared, plan, loss_sum, config, folder, say, guard, columns)
    columns["after"], texts = evaluate()

    # ----------------------------------------------------------------------------------------------------- export

    folder.write_json("results.json", columns)
    folder.write_json("texts.json", texts)
    if config.export.verifies_merged:  # on every process: where the model is sharded, forwards are collective
        labels = train_rows[0]["labels"]
        probe = {"input_ids": train_rows[0]["input_ids"], "decoder_input_ids": [start, *labels[:-1]]}
        logits = last_logits(accelerator.unwrap_model(prepared.model), probe, len(labels), accelerator.device)
    pattern = export_run(accelerator, prepared, config, tokenizer, folder)
    if accelerator.is_main_process and config.export.verifies_merged:
        difference = logit_differences(AutoModelForSeq2SeqLM, folder.path / "merged", probe, logits)
        folder.write_json("verification.json", difference.as_record(logits))
        say(difference.as_sentence("a summary", logits))
    accelerator.wait_for_everyone()

    say("\nA document: " + eval_rows[0]["document"][:500])
    say("Its summary: " + eval_rows[0]["summary"] + "\nWritten now: " + texts[0])
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
