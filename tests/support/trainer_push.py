"""A run of ``Trainer`` that pushes its checkpoints and its end, for a process that takes a local server for the Hub.

python tests/support/trainer_push.py FOLDER REPOSITORY OTHER_REPOSITORY
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from adalora_dist import AdaLoraCallback, adapt
from tests.support.tiny_language_model import tiny_llama
from tests.support.trainer_runs import SETTINGS, VOCABULARY, arguments, example_rows, trainer_of


def main(folder: str, repository: str, other: str) -> None:
    tiny_llama(VOCABULARY, hidden_size=16).save_pretrained(f"{folder}/base")
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/base", dtype=torch.float32)
    adapt(model, SETTINGS, seed=1)
    args = arguments(
        f"{folder}/run", 1, save_strategy="steps", save_steps=10, push_to_hub=True, hub_model_id=repository,
        hub_strategy="checkpoint", hub_always_push=True,
    )  # fmt: skip
    trainer = trainer_of(model, args, AdaLoraCallback(SETTINGS))
    trainer.train()
    trainer.push_to_hub()
    model.push_to_hub(other)
    ids = torch.tensor([example_rows()[3]["input_ids"]])
    with torch.no_grad():
        save_file({"ids": ids, "logits": model.eval()(ids).logits}, f"{folder}/logits.safetensors")


if __name__ == "__main__":
    main(*sys.argv[1:])
