"""Fine-tune BART, or another encoder-decoder, to write summaries, with adaptive ranks.

    deepspeed launch/summarize_bart.sh                        a demonstration, no Hub needed
    deepspeed launch/summarize_bart.sh --preset paper --task xsum --budget 0.65% --data hub
    deepspeed launch/summarize_bart.sh --model FOLDER_OR_HUB_ID --data FOLDER_OR_hub --task cnn_dailymail

DeepSpeed is the launch script's doing; this file runs under every engine: ``accelerate launch [--config_file
launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml] recipes/summarize_bart.py`` takes the same flags.
"""

from __future__ import annotations

import sys

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.summarization.config import SummarizationConfig

TABLE = CONFIGS / "tables" / "summarize_bart.yaml"
ARCHITECTURES = CONFIGS / "architectures"
DEMO_CONFIG = CONFIGS / "summarize_bart_demo.yaml"


def configuration(argv: list[str]) -> SummarizationConfig:
    """Flags over a YAML file over a preset. Without any of them, nor model or data, the demonstration's file."""
    return parse_config(SummarizationConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "", TABLE)


def main(config: SummarizationConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from datasets import Dataset
    from transformers import AutoModelForSeq2SeqLM

    from adalora_dist.tasks.batches import PairPlan
    from adalora_dist.tasks.demo_models.pretrained import demo_bart_folder
    from adalora_dist.tasks.evaluation.loss import validation_loss
    from adalora_dist.tasks.evaluation.rouge import rouge_scorer, rouge_scores
    from adalora_dist.tasks.evaluation.shown import shown_texts
    from adalora_dist.tasks.evaluation.texts import generate_texts
    from adalora_dist.tasks.losses import decoder_start_token, seq2seq_loss
    from adalora_dist.tasks.rows.table import digest_of_tokens
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.tasks.summarization.rows import encode_summaries, load_summaries
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        return dry_run(
            config, AutoModelForSeq2SeqLM, ARCHITECTURES, "demo-bart", [config.data.task],
            lambda: load_summaries(config.data, None, config.evaluation.eval_every > 0)["train"],
        )  # fmt: skip
    rouge_scorer()  # now, not after training
    run = Run(config)
    run.begin()

    # ------------------------------------------------------------------------------------------------------------ model
    run.demo_model("a tiny BART, pre-trained here on built-in reports", demo_bart_folder)
    tokenizer = run.load_model(AutoModelForSeq2SeqLM)
    start = decoder_start_token(run.model)

    # ------------------------------------------------------------------------------------------------------------- data
    run.demo_data("built-in reports", "--data FOLDER_OR_FILE, or --data hub for XSum and CNN/DailyMail")
    data, settings = run.config.data, run.config.evaluation
    with run.main_process_first():  # the others find its work in the cache
        splits = load_summaries(data, run.bad_rows, run.validates)
        rows = {name: encode_summaries(split, tokenizer, data) for name, split in splits.items()}
    train_rows, eval_rows, validation = rows["train"], rows["test"], rows.get("validation")
    run.report_bad_rows()
    run.say_sizes(f"{len(train_rows):,} training rows, {len(eval_rows):,} evaluation rows", validation)
    num_source, num_targets = train_rows["num_source"][:], train_rows["num_targets"][:]
    plan = PairPlan(num_source, num_targets, *run.batching, digest_of_tokens(train_rows))

    # ---------------------------------------------------------------------------------------------- adapters and engine
    run.prepare(plan)

    # --------------------------------------------------------------------------------------------------------- evaluate
    synced, padding = run.generates_together(), padding_token(tokenizer)
    chunk = run.config.train.logits_chunk

    def evaluate(rows: Dataset) -> tuple[dict[str, float], list[str]]:
        sources, lengths = rows["input_ids"], rows["num_source"][:]
        texts = generate_texts(run.model, tokenizer, sources, lengths, settings, **run.ranks, synced_gpus=synced)
        return rouge_scores(texts, rows["summary"], **run.ranks), texts

    def validate() -> dict[str, float]:
        assert validation is not None
        loss_sum, counts = seq2seq_loss(validation, padding, start, run.device, chunk), validation["num_targets"][:]
        lengths, size = validation["num_source"][:], settings.eval_batch_size
        loss = validation_loss(run.model, loss_sum, lengths, counts, size, **run.ranks)
        scores, texts = evaluate(validation)
        run.say(shown_texts(validation["document"], texts, settings.show_samples))
        return loss | scores

    columns = run.notes
    if run.evaluates_before:
        columns["before"], _ = evaluate(eval_rows)

    # ------------------------------------------------------------------------------------------------------------ train
    run.train(seq2seq_loss(train_rows, padding, start, run.device, chunk), columns, validate)
    columns["after"], texts = evaluate(eval_rows)

    # ----------------------------------------------------------------------------------------------------------- export
    run.folder.write_json("results.json", columns)
    run.folder.write_json("texts.json", texts)
    labels = train_rows[0]["labels"]
    probe = {"input_ids": train_rows[0]["input_ids"], "decoder_input_ids": [start, *labels[:-1]]}
    run.export(tokenizer, probe, len(labels), "a summary")

    # ----------------------------------------------------------------------------------------------------------- finish
    run.say("\nA document: " + eval_rows[0]["document"][:500])
    run.say("Its summary: " + eval_rows[0]["summary"] + "\nWritten now: " + texts[0])
    run.finish(metrics_table(columns))
    run.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
