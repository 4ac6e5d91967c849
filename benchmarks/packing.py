"""What packing saves: positions, and time of forward and backward, with rows of the commonsense recipe.

    python benchmarks/packing.py                        the built-in questions
    python benchmarks/packing.py --data FOLDER          all tasks in it

A LLaMA of four layers and width 256 with SmolLM2's tokenizer (fetched once); fp32, sdpa, adapters of rank 8 on all
linear maps, batches of 16 in micro-batches of 8. Times are thread CPU seconds of one core, medians of ratios within a
round in which both take their turn (``speed.py``).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from speed import ratio, take_turns
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from adalora_dist.artifacts.adapted_model import adapt
from adalora_dist.config.methods import LoraConfig
from adalora_dist.tasks.batches import BatchPlan
from adalora_dist.tasks.commonsense.config import CommonsenseDataConfig
from adalora_dist.tasks.commonsense.demo import demo_questions_folder
from adalora_dist.tasks.commonsense.prompts import encode_examples
from adalora_dist.tasks.commonsense.rows import load_tasks
from adalora_dist.tasks.demo_models.smollm2 import demo_model_folder
from adalora_dist.tasks.losses import causal_loss
from adalora_dist.tasks.packing import positions_of
from adalora_dist.tasks.rows.tokens import padding_token

BATCH, MICRO, STEPS, ROUNDS = 16, 8, 2, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="")
    data = CommonsenseDataConfig(source=parser.parse_args().data or str(demo_questions_folder()), max_train_rows=400)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(demo_model_folder(print))
    rows = encode_examples(load_tasks(data)[0], tokenizer, 256)
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size)).train()
    adapt(model, LoraConfig(init_rank=8))
    print(
        f"{len(rows)} rows, {min(len(r['input_ids']) for r in rows)} to {max(len(r['input_ids']) for r in rows)} tokens"
    )
    for grouped in (True, False):
        plan = BatchPlan.of_rows(rows, BATCH, 6, grouped)
        tokens, padded, packed = positions_of(plan, MICRO, 1, flat=False)
        shares = f"{1 - tokens / padded:.1%} -> {1 - tokens / packed:.1%}"
        print(f"group_by_length {grouped}: padding {shares} of the positions")
        parts = [part for step in range(STEPS) for part in plan.micro_batches(step, 0, 1, MICRO)]

        def run(how: bool, parts: list[list[int]] = parts) -> None:
            loss_sum = causal_loss(rows, padding_token(tokenizer), torch.device("cpu"), packed=how)
            for part in parts:
                loss_sum(model, part).backward()
            model.zero_grad()

        seconds = take_turns({"padded": partial(run, False), "packed": partial(run, True)}, ROUNDS, warmup=1)
        faster = ratio(seconds, "padded", "packed")
        print(
            f"    {1 - packed / padded:.1%} of the positions saved; tokens/s packed over padded {faster:.2f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
