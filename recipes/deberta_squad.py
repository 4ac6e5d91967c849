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
from pathlib import Path

from adalora_dist.config.flags import parse_config, user_errors
from adalora_dist.tasks.squad.config import SquadConfig

TABLE = Path(__file__).parent / "configs" / "tables" / "deberta_squad.yaml"
ARCHITECTURES = Path(__file__).parent / "configs" / "architectures"
DEMO_CONFIG = Path(__file__).parent / "configs" / "deberta_squad_demo.yaml"


# ---------------------------------------------------------------------------------------------------- configuration


def configuration(argv: list[str]) -> SquadConfig:
    """Flags over a YAML file over a preset. Without any of them, nor model or data, the demonstration's file."""
    given = {argument.partition("=")[0] for argument in argv}
    if not given & {"--config", "--preset", "--model", "--data"}:
        argv = ["--config", str(DEMO_CONFIG), *argv]
    return parse_config(SquadConfig, argv, __doc__ or "", TABLE)


def main(config: SquadConfig) -> None:
    # Heavy imports wait until the configuration is known to be right.
    from accelerate.utils import set_seed
    from transformers import AutoModelForQuestionAnswering

    from adalora_dist.artifacts.hub.push import check_push_of_run, push_run
    from adalora_dist.backbones.load import load_backbone, load_tokenizer
    from adalora_dist.backbones.quantization import bitsandbytes_config
    from adalora_dist.methods.inject import adapt
    from adalora_dist.tasks.batches import BatchPlan
    from adalora_dist.tasks.evaluation.predict import largest_difference, predict
    from adalora_dist.tasks.losses import span_loss
    from adalora_dist.tasks.rows.bad_rows import BadRows
    from adalora_dist.tasks.rows.public import count_rows
    from adalora_dist.tasks.rows.tokens import padding_token
    from adalora_dist.tasks.squad.answers import Answer, find_answers
    from adalora_dist.tasks.squad.demo import demo_passages, demo_passages_folder
    from adalora_dist.tasks.squad.metrics import best_thresholds, squad_scores
    from adalora_dist.tasks.squad.rows import load_squad, make_windows
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

    if config.train.dry_run:  # a long passage makes several windows: steps are at least these
        built_in, task = not config.data.source, config.data.task
        num_rows = count_rows(
            config.data,
            [task],
            lambda: demo_passages("train", task == "v2.0") if built_in else load_squad(config.data)[0],
        )
        return dry_run(config, AutoModelForQuestionAnswering, num_rows, ARCHITECTURES, "all-MiniLM-L6-v2")
    refuse_used_folder(config)
    check_push_of_run(config)
    accelerator = build_accelerator(config.train)
    guard = Guard(accelerator, config)
    say, engine = accelerator.print, engine_name(accelerator)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    quantization = bitsandbytes_config(config, engine)

    # ------------------------------------------------------------------------------------------------------ data

    if not config.data.source:
        passages = demo_passages_folder(config.data.task)
        say(f"Data: built-in passages, not SQuAD ({passages}). Your own: --data FOLDER, or --data hub.")
        config = config.model_copy(update={"data": config.data.model_copy(update={"source": str(passages)})})
    bad_rows = BadRows(config.data.bad_rows)
    train_questions, eval_questions = load_squad(config.data, bad_rows)
    if summary := bad_rows.summary():
        say(summary)
    right = [question.answers for question in eval_questions]

    # --------------------------------------------------------------------------------------------- model and tokens

    if not config.model.name:
        from adalora_dist.tasks.demo_models.minilm import demo_encoder_folder

        with accelerator.main_process_first():
            name = str(demo_encoder_folder(say))
        say("Model: all-MiniLM-L6-v2, 22.7 million parameters. Your own: --model FOLDER_OR_HUB_ID.")
        config = config.model_copy(update={"model": config.model.model_copy(update={"name": name})})
    tokenizer = load_tokenizer(config.model)
    padding = padding_token(tokenizer)
    with accelerator.main_process_first():  # the others find it in the cache
        show = accelerator.is_main_process
        windows = make_windows(train_questions, tokenizer, config.data, "tokenise train", show)
        eval_windows = make_windows(eval_questions, tokenizer, config.data, "tokenise validation", show)
    inputs, eval_inputs = ([window.inputs for window in part] for part in (windows, eval_windows))
    say(
        f"{len(train_questions)} training questions in {len(windows)} windows; evaluation: {len(eval_questions)} in "
        f"{len(eval_windows)}"
    )

    def one_run(config: SquadConfig) -> dict[str, float]:
        """Train and evaluate with one seed; the scores at the end."""
        set_seed(config.train.seed)
        resumed = find_checkpoint(config)
        if resumed is not None:
            say(f"Continuing after step {resumed.step} from {resumed.path}")
        model, _ = load_backbone(config.model, AutoModelForQuestionAnswering, quantization)
        settings = (config.train.batch_size, config.train.seed, config.train.group_by_length)
        plan = BatchPlan.of_inputs(inputs, [window.span for window in windows], *settings)
        num_steps = total_steps(config.train, plan)

        # --------------------------------------------------------------------------------------- adapters, engine

        adapt(model, config.adapter, config.train.seed)
        prepared = prepare(accelerator, model, config, num_steps, resumed)
        facts = run_facts(config, engine, accelerator.num_processes, num_steps, prepared, bad_rows)
        folder = RunFolder(config, accelerator.is_main_process, facts, resumed)
        start_trackers(accelerator, config)
        say(facts_line(facts, prepared.hooks.method_step.plan()))

        # ----------------------------------------------------------------------------------------------- evaluate

        threshold = config.data.null_threshold if config.data.task == "v2.0" else None

        def answers_of(logits: list) -> list[Answer]:
            settings = (config.data.num_best, config.data.max_answer_length)
            return find_answers(eval_questions, eval_windows, logits, *settings)

        def scores_of(answers: list[Answer]) -> dict[str, float]:
            scores = squad_scores(config.data.task, [answer.given(threshold) for answer in answers], right)
            if threshold is not None:
                null_scores = [answer.null_score for answer in answers]
                scores |= best_thresholds([answer.text for answer in answers], null_scores, right)
            return scores

        def evaluate() -> list:
            unwrapped, size = accelerator.unwrap_model(prepared.model), config.evaluation.eval_batch_size
            outputs = ("start_logits", "end_logits")
            return predict(unwrapped, eval_inputs, padding, size, **ranks, description="validation", outputs=outputs)

        if resumed is not None:
            columns = resumed.run["notes"]
        else:
            columns = {"before": scores_of(answers_of(evaluate()))} if config.evaluation.evaluate_before else {}

        # -------------------------------------------------------------------------------------------------- train

        loss_sum = span_loss(inputs, [window.span for window in windows], padding, accelerator.device)
        train(accelerator, prepared, plan, loss_sum, config, folder, say, guard, columns)
        logits = evaluate()
        answers = answers_of(logits)
        columns["after"] = scores_of(answers)

        # ------------------------------------------------------------------------------------------------- export

        ids = [question.id for question in eval_questions]
        given = [answer.given(threshold) for answer in answers]
        folder.write_json("predictions.json", dict(zip(ids, given, strict=True)))
        folder.write_json("nbest_predictions.json", {i: a.best for i, a in zip(ids, answers, strict=True)})
        pattern = export_run(accelerator, prepared, config, tokenizer, folder)
        if accelerator.is_main_process and config.export.verifies_merged:
            plain = load_plainly(AutoModelForQuestionAnswering, folder.path / "merged")
            size, outputs = config.evaluation.eval_batch_size, ("start_logits", "end_logits")
            again = predict(plain, eval_inputs, padding, size, description="merged", outputs=outputs, gather=list)
            columns["merged"] = scores_of(answers_of(again))
            far = largest_difference(again, logits)
            folder.write_json("verification.json", {"largest_logit_difference": far})
            say(f"Merged model in plain transformers: logits differ from the trained model's by up to {far:.1e}")
        folder.write_json("results.json", columns)
        accelerator.wait_for_everyone()

        say("\n" + metrics_table(columns))
        say(rank_report(prepared, pattern))
        say(folder.listing())
        return columns["after"]

    # ------------------------------------------------------------------------------------------------------- seeds

    run_seeds(accelerator, config, one_run, {})
    accelerator.end_training()
    guard.close()
    if accelerator.is_main_process:  # no process group is left that could wait for the network
        push_run(config)


if __name__ == "__main__":
    with user_errors():
        main(configuration(sys.argv[1:]))
