"""Fine-tune an encoder to answer questions on passages (SQuAD v1.1, v2.0) with adaptive ranks, and compare.

    accelerate launch recipes/deberta_squad.py                                       a demonstration, no Hub needed
    accelerate launch recipes/deberta_squad.py --preset paper --task v1.1 --budget 0.08%        the paper's set-up
    accelerate launch recipes/deberta_squad.py --preset paper --task v2.0 --budget 0.08% --method lora --seeds 1 2 3
    accelerate launch recipes/deberta_squad.py --model FOLDER_OR_HUB_ID --data FOLDER

Presets are in recipes/configs/tables/deberta_squad.yaml; flags override what they set. Engines are chosen by the
launcher, not here: add --config_file launch/accelerate/{ddp,fsdp2,zero2,zero3}.yaml to ``accelerate launch``.
"""

from __future__ import annotations

import sys
from functools import partial

from adalora_dist.config.demonstration import or_demonstration
from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.io.shipped import CONFIGS
from adalora_dist.tasks.squad.config import SquadConfig

TABLE = CONFIGS / "tables" / "deberta_squad.yaml"
ARCHITECTURES = CONFIGS / "architectures"
DEMO_CONFIG = CONFIGS / "deberta_squad_demo.yaml"
ENDS = {"num_labels": 2}  # the two of an answer, however many classes the model's files know


def configuration(argv: list[str]) -> SquadConfig:
    """Flags over a YAML file over a preset. Without any of them, nor model or data, the demonstration's file."""
    return parse_config(SquadConfig, or_demonstration(argv, DEMO_CONFIG), __doc__ or "", TABLE)


def main(config: SquadConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from transformers import AutoModelForQuestionAnswering

    from adalora_dist.backbones.load import load_tokenizer
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder
    from adalora_dist.tasks.evaluation.predict import Outputs, largest_difference, predict
    from adalora_dist.tasks.losses import span_loss
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.tasks.squad.answers import Answer, find_answers
    from adalora_dist.tasks.squad.demo import demo_passages, demo_passages_folder
    from adalora_dist.tasks.squad.rows import load_squad_parts, make_windows
    from adalora_dist.tasks.squad.scores import given_answers, score, windows_loss
    from adalora_dist.training.dry_run import dry_run
    from adalora_dist.training.report import metrics_table
    from adalora_dist.training.run import Run
    from adalora_dist.training.seeds import each_seed

    task, validates = config.data.task, config.evaluation.eval_every > 0
    if config.train.dry_run:  # a long passage makes several windows: steps are at least these
        built_in, own_rows = not config.data.source, (config.data, None, validates)
        return dry_run(
            config, AutoModelForQuestionAnswering, ARCHITECTURES, "all-MiniLM-L6-v2", [task],
            lambda: demo_passages("train", task == "v2.0") if built_in else load_squad_parts(*own_rows)[0],
            **ENDS,
        )  # fmt: skip
    whole = Run(config)

    # ------------------------------------------------------------------------------------------------------------- data
    own = "--data FOLDER_OR_FILE, or --data hub"
    whole.demo_data("built-in passages, not SQuAD", own, lambda: demo_passages_folder(task))
    data = whole.config.data
    train_questions, eval_questions, validation = load_squad_parts(data, whole.bad_rows, validates)
    whole.report_bad_rows()

    # ----------------------------------------------------------------------------------------------------------- tokens
    whole.demo_model("all-MiniLM-L6-v2, 22.7 million parameters", demo_encoder_folder)
    tokenizer = load_tokenizer(whole.config.model)
    padding = padding_token(tokenizer)
    with whole.main_process_first():  # the others find it in the cache
        windows = make_windows(train_questions, tokenizer, data, "tokenise train", whole.is_main)
        eval_windows = make_windows(eval_questions, tokenizer, data, "tokenise evaluation", whole.is_main)
        checked = make_windows(validation or [], tokenizer, data, "tokenise validation", whole.is_main)
    inputs, eval_inputs = ([window.inputs for window in part] for part in (windows, eval_windows))
    spans = [window.span for window in windows]
    sizes = f"{len(eval_questions)} in {len(eval_windows)}"
    whole.say_sizes(
        f"{len(train_questions)} training questions in {len(windows)} windows; evaluation: {sizes}", validation
    )

    # --------------------------------------------------------------------------------------------------------- evaluate
    size = config.evaluation.eval_batch_size
    common = (eval_inputs, padding, size)
    outputs = ("start_logits", "end_logits")

    def scored(logits: Outputs) -> tuple[dict[str, float], list[Answer]]:
        answers = find_answers(eval_questions, eval_windows, logits, data.num_best, data.max_answer_length)
        return score(data, eval_questions, answers), answers

    def evaluate(run: Run[SquadConfig]) -> Outputs:
        return predict(run.model, *common, **run.ranks, description="evaluation", outputs=outputs)

    def validate(run: Run[SquadConfig]) -> dict[str, float]:
        inputs, questions = [window.inputs for window in checked], validation or []
        logits = predict(run.model, inputs, padding, size, **run.ranks, description="validation", outputs=outputs)
        answers = find_answers(questions, checked, logits, data.num_best, data.max_answer_length)
        return {"loss": windows_loss(checked, logits), **score(data, questions, answers)}

    for run in each_seed(whole, {}):
        # -------------------------------------------------------------------------------------------------------- model
        run.load_model(AutoModelForQuestionAnswering, ENDS)

        # ------------------------------------------------------------------------------------------ adapters and engine
        run.prepare(BatchPlan.of_inputs(inputs, spans, *run.batching))
        columns = run.notes
        if run.evaluates_before:
            columns["before"], _ = scored(evaluate(run))

        # -------------------------------------------------------------------------------------------------------- train
        run.train(span_loss(inputs, spans, padding, run.device), columns, partial(validate, run))
        logits = evaluate(run)
        columns["after"], answers = scored(logits)

        # ------------------------------------------------------------------------------------------------------- export
        ids = [question.id for question in eval_questions]
        run.folder.write_json("predictions.json", dict(zip(ids, given_answers(data, answers), strict=True)))
        run.folder.write_json("nbest_predictions.json", {i: a.best for i, a in zip(ids, answers, strict=True)})
        run.export(tokenizer)
        if run.verifies_here:
            again = predict(run.merged_model(), *common, description="merged", outputs=outputs, gather=list)
            columns["merged"], _ = scored(again)
            run.report_difference(largest_difference(again, logits))
        run.folder.write_json("results.json", columns)

        # ------------------------------------------------------------------------------------------------------- finish
        run.finish(metrics_table(columns), columns["after"])
    whole.close()


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
