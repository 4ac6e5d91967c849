"""Names that PEFT, axolotl, LLaMA-Factory and transformers have for what is a flag here, so that a hint can say it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

SAME = {
    "init_r": "init_rank",
    "target_r": "target_rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "tinit": "initial_warmup_steps",
    "tfinal": "final_steps",
    "deltaT": "mask_interval_steps",
    "beta1": "beta1",
    "beta2": "beta2",
    "orth_reg_weight": "orthogonality",
}
"""Fields of PEFT's ``AdaLoraConfig`` that mean one thing under two names."""
_FLAGS = {
    "init-rank": "r rank lora-r lora-rank",
    "alpha": "lora-alpha",
    "dropout": "lora-dropout",
    "targets": "target-modules lora-target lora-target-modules lora-target-linear target-parameters",
    "train-modules": "modules-to-save lora-modules-to-save additional-target",
    "rslora": "use-rslora peft-use-rslora",
    "lora-plus-ratio": "loraplus-lr-ratio loraplus-ratio",
    "init-from": "lora-model-dir adapter-name-or-path",
    "method": "finetuning-type adapter peft-type",
    "model": "base-model model-name-or-path base-model-name-or-path model-id pretrained-model-name-or-path",
    "revision": "model-revision revision-of-model",
    "dtype": "torch-dtype",
    "data": "dataset datasets dataset-name dataset-path dataset-dir train-file data-path",
    "eval-split": "eval-dataset test-datasets",
    "eval-share": "val-set-size val-size test-size",
    "max-length": "cutoff-len sequence-len max-seq-length max-seq-len model-max-length block-size",
    "max-train-rows": "max-samples max-train-samples",
    "max-eval-rows": "max-eval-samples",
    "train-on": "train-on-inputs train-on-prompt assistant-only-loss completion-only-loss",
    "micro-batch-size": "per-device-train-batch-size",
    "batch-size": "gradient-accumulation-steps effective-batch-size train-batch-size global-batch-size",
    "eval-batch-size": "per-device-eval-batch-size",
    "epochs": "num-train-epochs num-epochs",
    "lr-schedule": "lr-scheduler lr-scheduler-type",
    "lr-warmup-ratio": "warmup-ratio",
    "lr-warmup-steps": "warmup-steps num-warmup-steps",
    "max-grad-norm": "gradient-clipping gradient-clip-val",
    "precision": "mixed-precision bf16 fp16 tf32",
    "compile": "torch-compile use-torch-compile",
    "quantization": "load-in-4bit load-in-8bit quantization-bit bnb-4bit-quant-type quantization-method",
    "double-quant": "bnb-4bit-use-double-quant double-quantization",
    "attn-implementation": "flash-attn flash-attention sdp-attention",
    "checkpoint-every": "save-steps save-strategy",
    "offload-activations": "activation-offloading",
    "keep-checkpoints": "save-total-limit",
    "log-every": "logging-steps",
    "eval-every": "eval-steps",
    "resume": "resume-from-checkpoint auto-resume-from-checkpoints",
    "overwrite": "overwrite-output-dir",
    "trackers": "report-to use-wandb use-tensorboard wandb-project",
    "push-to-hub": "hub-model-id push-to-hub-model-id",
    "push-revision": "hub-revision",
    "export-dtype": "merge-dtype",
}
"""Flag here, and the names that others have, as flags are spelt."""
_SPELT = {name.replace("_", "-"): flag.replace("_", "-") for name, flag in SAME.items()}
_SPELT |= {name: flag for flag, names in _FLAGS.items() for name in names.split()}
_OF_LAUNCHERS = {
    "processes": "num-processes nproc-per-node nproc num-gpus num-accelerators gpus gpus-per-node",
    "nodes": "num-nodes nnodes num-machines",
    "node-rank": "machine-rank",
    "main-address": "main-process-ip master-addr rdzv-endpoint",
    "restarts": "max-restarts",
    "gpus": "n processes num-processes nproc-per-node num-gpus gpus-per-node",
}
"""The same of options of ``adalora-dist run`` and ``plan``: they are meant where they can be given."""
_METHODS = {"use-dora": "dora", "peft-use-dora": "dora", "use-adalora": "adalora"}


def flag_here(name: str, flags: Iterable[str]) -> str:
    """``--init-rank`` for ``lora_r`` or ``--lora-r``; empty for a name of nobody's, or of what ``flags`` lack."""
    word = re.sub("^-+", "", str(name)).replace("_", "-")
    if word in _METHODS and "method" in flags:
        return f"--method {_METHODS[word]}"
    flag = _SPELT.get(word) or _SPELT.get(word.lower())
    meant = [flag] if flag else [own for own, names in _OF_LAUNCHERS.items() if word.lower() in names.split()]
    known = set(flags)
    return next((f"--{own}" for own in meant if own in known), "")


def setting_here(name: object, settings: Mapping[str, tuple[str, str, object]]) -> str:
    """The same in a file: ``adapter.init_rank``. ``settings`` are section, name and more by flag."""
    flag, _, value = flag_here(str(name), settings).removeprefix("--").partition(" ")
    if not flag:
        return ""
    section, own, _ = settings[flag]
    return f"{section}.{own}" + (f": {value}" if value else "")
