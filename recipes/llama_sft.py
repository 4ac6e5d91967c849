"""Fine-tune a causal model on your own instructions, conversations or texts, with adaptive ranks.

    accelerate launch recipes/llama_sft.py                                           a demonstration, no Hub needed
    accelerate launch recipes/llama_sft.py --model FOLDER_OR_HUB_ID --data FILE_OR_FOLDER_OR_hub:ID
    accelerate launch recipes/llama_sft.py --model FOLDER_OR_HUB_ID --data a.jsonl=2 b.parquet --dry-run

docs/data.md has every form of data. Engines are chosen by the launcher, not here: add --config_file
launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to ``accelerate launch``, or run ``deepspeed launch/llama_sft.sh``.
"""

from __future__ import annotations

import sys

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.sft.config import SftConfig

ARCHITECTURES = CONFIGS / "architectures"
DEMO_CONFIG = CONFIGS / "llama_sft_demo.yaml"


def configuration(argv: list[str]) -> SftConfig:
    """Flags over a YAML file over defaults. Without a model, data or file of the user's, the demonstration's file."""
    return parse_config(SftConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "")


def main(config: SftConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForCausalLM

    from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
    from adalora_dist.tasks.losses import causal_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.tasks.sft.answers import answer_questions, last_prompts, read_questions
    from adalora_dist.tasks.sft.evaluation import SftEvaluation
    from adalora_dist.tasks.sft.preview import preview, show
    from adalora_dist.tasks.sft.rows import load_rows
    from adalora_dist.tasks.sft.samples import records_of, samples_text
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run

    if config.train.dry_run:
        num_rows, first_rows = preview(config.data, config.model)
        demo = "SmolLM2-135M-Instruct"
        dry_run(config, AutoModelForCausalLM, ARCHITECTURES, demo, ["own"], lambda: range(num_rows))
        return show(first_rows)
    questions = read_questions(config.evaluation.answer)
    run = Run(config)
    run.begin()

    # ------------------------------------------------------------------------------------------------------------ model
    run.demo_model("SmolLM2-135M-Instruct, dequantised 4-bit weights", demo_model_folder)
    tokenizer = run.load_model(AutoModelForCausalLM)

    # ------------------------------------------------------------------------------------------------------------- data
    run.demo_data("built-in conversations", "--data FILE_OR_FOLDER_OR_hub:ID (docs/data.md)")
    data, settings = run.config.data, run.config.evaluation
    with run.main_process_first():  # the others find it in the cache
        rows = load_rows(data, tokenizer, run.bad_rows, run.say, run.config.train.seed, settings)
    run.report_bad_rows()
    for num_turns, prompts in last_prompts(questions, tokenizer).items():
        run.check_replies(prompts, "answer_tokens", num_turns)

    # ---------------------------------------------------------------------------------------------- adapters and engine
    run.prepare(rows.plan(*run.batching))

    # --------------------------------------------------------------------------------------------------------- evaluate
    padding, chunk, together = padding_token(tokenizer), run.config.train.logits_chunk, run.generates_together()
    packed = run.packs(padding)
    evaluate = SftEvaluation(rows, tokenizer, settings, run.device, chunk, run.ranks, together)
    found = {"before": {}, **run.notes}
    if run.evaluates_before:
        found["before"] = evaluate(run.model)

    # ------------------------------------------------------------------------------------------------------------ train
    loss = causal_loss(rows.train, padding, run.device, chunk, packed)
    run.train(loss, found, lambda: evaluate.scores(run.model, run.say))
    found["after"] = evaluate(run.model)

    # ----------------------------------------------------------------------------------------------------------- export
    name = run.folder.path.name
    answers = answer_questions(questions, run.model, tokenizer, settings, run.ranks, together, name, rows.closing)
    run.folder.write_lines("answers.jsonl", answers)
    scores = {when: outcome["scores"] for when, outcome in found.items() if outcome}
    records = records_of(rows.samples, found, tokenizer)
    run.folder.write_json("results.json", scores)
    run.folder.write_json("samples.json", records)
    first = rows.train[0]
    run.export(tokenizer, first["input_ids"], first["num_targets"] + 1, "a row's end")

    # ----------------------------------------------------------------------------------------------------------- finish
    run.say(samples_text(records))
    run.finish(metrics_table(scores))
    run.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
