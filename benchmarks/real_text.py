"""The generating recipes on slices of XSum, CNN/DailyMail and E2E NLG, each on two processes of another engine.

    python benchmarks/real_text.py --data ../shared/data --output-dir runs/real_text > tables.md

--data has summarization/{xsum,cnn_dailymail}/train.jsonl, of which the last rows are set aside for evaluation, and
e2e/{train,test}.jsonl. No pre-trained BART or GPT-2 can be had without the Hub: the backbones are those of the
demonstrations with random weights and a word of the slice per token, so that scores say nothing about the method. About
five minutes on two cores; what has been run already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BartConfig, BartForConditionalGeneration, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from adalora_dist.tasks.demo_models.pretrained import BART_SHAPE, GPT2_SHAPE, word_tokenizer
from adalora_dist.tasks.e2e.rows import prompt_text

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
NUM_EVAL_ROWS = 16
POSITIONS = 512

ZERO3 = "deepspeed --num_accelerators 2 launch/summarize_bart.sh --deepspeed-config ds_configs/zero3.json"
FSDP2 = "accelerate launch --config_file launch/accelerate/fsdp2.yaml --num_processes 2 recipes/summarize_bart.py"
DDP = "accelerate launch --config_file launch/accelerate/ddp.yaml --num_processes 2 recipes/gpt2_e2e.py"
COMMON = (
    "--init-rank 6 --target-rank 4 --alpha 96 --start paper --init orthonormal --learning-rate 1e-2 "
    "--log-every 20 --num-beams 4 "
)
RUNS = {
    "xsum": f"{ZERO3} --task xsum --max-steps 100 --batch-size 16 --micro-batch-size 8 --eval-batch-size 8 {COMMON}"
    "--max-source-length 256 --max-target-length 48 --max-new-tokens 48",
    "cnn_dailymail": f"{FSDP2} --task cnn_dailymail --max-steps 60 --batch-size 16 --micro-batch-size 8 {COMMON}"
    "--eval-batch-size 8 --max-source-length 384 --max-target-length 80 --max-new-tokens 80",
    "e2e": f"{DDP} --max-steps 150 --batch-size 16 --micro-batch-size 8 --eval-batch-size 8 {COMMON}"
    "--max-train-rows 1000 --max-eval-rows 30 --max-length 128 --max-new-tokens 40",
}


def write_inputs(name: str, source: Path, folder: Path) -> Path:
    """A backbone for the data set in folder/model; the folder to be given as --data."""
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: PreTrainedModel
    torch.manual_seed(0)
    if name == "e2e":
        data = source / "e2e"
        rows = [json.loads(line) for split in ("train", "test") for line in (data / f"{split}.jsonl").open()]
        tokenizer = word_tokenizer([text for row in rows for text in (prompt_text(row["mr"]), row["ref"])])
        settings: dict[str, Any] = {**GPT2_SHAPE, **ids, "vocab_size": len(tokenizer), "n_positions": POSITIONS}
        model = GPT2LMHeadModel(GPT2Config(**settings))
    else:
        data = folder / "data"
        lines = (source / "summarization" / name / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / name).mkdir(parents=True, exist_ok=True)
        for split, part in (("train", lines[:-NUM_EVAL_ROWS]), ("test", lines[-NUM_EVAL_ROWS:])):
            (data / name / f"{split}.jsonl").write_text("".join(part), encoding="utf-8")
        tokenizer = word_tokenizer([text for line in lines for text in json.loads(line).values()])
        settings = {**BART_SHAPE, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": POSITIONS}
        settings |= {"decoder_start_token_id": 2, "forced_eos_token_id": None}
        model = BartForConditionalGeneration(BartConfig(**settings))
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--output-dir", type=Path, default=Path("runs/real_text"))
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS))
    args = parser.parse_args()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in args.only:
        folder = (args.output_dir / name).resolve()
        run = folder / "run"
        if not (run / "results.json").exists():
            data = write_inputs(name, args.data, folder)
            where = ["--model", str(folder / "model"), "--data", str(data.resolve()), "--output-dir", str(run)]
            words = [*shlex.split(RUNS[name]), *where, "--overwrite"]
            print(shlex.join(words), file=sys.stderr, flush=True)
            subprocess.run(words, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        facts, results = (json.loads((run / file).read_text()) for file in ("run.json", "results.json"))
        losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").open()]
        print(
            f"{name}: {facts['engine']} on {facts['num_processes']} processes, {facts['num_steps']} steps, "
            f"{facts['initial_budget']} -> {facts['target_budget']} triplets; loss per word "
            f"{sum(losses[:10]) / 10:.2f} -> {sum(losses[-10:]) / 10:.2f} (means of ten steps)\n"
        )
        print("| metric | before | after |\n| --- | ---: | ---: |")
        for metric, before in results["before"].items():
            print(f"| {metric} | {before:.2f} | {results['after'][metric]:.2f} |")
        print()


if __name__ == "__main__":
    main()
