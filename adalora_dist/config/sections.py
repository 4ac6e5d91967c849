"""The one schema: what a run is, as validated data. Importing this file never imports torch.

Sections are nested in YAML (``adapter: {target_rank: 8}``) and flat on the command line (``--target-rank 8``),
so field names are unique over all sections. Rules that data or model decide (the number of optimizer steps, the
number of adapted matrices) are checked by ``schedule.py`` once those are known; every other rule is checked here.
A validator's message is one line: the settings with their values, the rule, the remedy.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from adalora_dist.config.compilation import CompileConfig, check_compile
from adalora_dist.config.data import ColumnsConfig as ColumnsConfig
from adalora_dist.config.data import DataConfig as DataConfig
from adalora_dist.config.formats import ExportFormat
from adalora_dist.config.hub_names import check_branch, check_repo_id
from adalora_dist.config.merging import check_merging
from adalora_dist.config.methods import METHODS, AdaLoraConfig, AnyMethodConfig
from adalora_dist.config.section import Section, Switch
from adalora_dist.config.unread import check_unread


class ModelConfig(Section):
    name: Annotated[str, tyro.conf.arg(name="model")] = ""
    """Hub id or local folder of the backbone; empty: the recipe's built-in demonstration model."""
    revision: str | None = None
    """Hub revision (branch, tag or commit) of the backbone; default: its main branch."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Storage type of the frozen backbone; auto: as its files say. Adapters are always float32."""
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"
    """Attention kernel; auto: transformers decides."""
    allow_pickle_weights: bool = False
    """Also load weights from pytorch_model.bin, a pickle; with FSDP2 every process then reads them whole."""
    trust_remote_code: bool = False
    """Run Python code from the model's repository. Needs revision to be a full commit hash; of a folder, the digest of
    its code, which the refusal of any other names."""

    @model_validator(mode="after")
    def _pinned_code(self) -> ModelConfig:
        # A branch or a tag can be moved to other code after someone has read it; a commit cannot.
        if self.trust_remote_code and not re.fullmatch(r"[0-9a-f]{40}", self.revision or ""):
            raise ValueError(
                f"trust_remote_code true with revision {self.revision}: code is run from a pinned commit only; "
                "set revision to the 40 hexadecimal digits of the commit that you have read"
            )
        return self


class TrainConfig(CompileConfig):
    output_dir: str = Field("runs/latest", min_length=1)
    """Run folder: resolved configuration, metrics.jsonl, exports. A folder that holds a run is refused."""
    overwrite: bool = False
    """Replace the run that output_dir holds."""
    dry_run: bool = False
    """Only say what the run would be, without reading weights: steps, budgets, trainable parameters."""
    epochs: float = Field(3.0, gt=0)
    """Passes over the training data; ignored when max_steps is set."""
    max_steps: int | None = Field(None, ge=1)
    """Number of optimizer steps."""
    batch_size: int = Field(16, ge=1)
    """Sequences per optimizer step over ALL processes, so that 1 and N processes train alike."""
    micro_batch_size: int = Field(16, ge=1)
    """Largest number of sequences per process in one forward; accumulation steps follow from it.

    Must divide batch_size unless it is larger."""
    micro_batch_tokens: int = Field(0, ge=0)
    """Largest number of positions, padding among them, per process in one forward, in place of micro_batch_size: short
    rows are many at a time, long ones few. 0: micro_batch_size counts."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    lr_schedule: Literal["linear", "cosine", "constant"] = "linear"
    """Decay after the learning-rate warm-up."""
    lr_end_ratio: float = Field(0.0, ge=0, le=1)
    """Share of learning_rate that the decay ends at."""
    lr_warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps over which the learning rate rises from 0."""
    lr_warmup_steps: int | None = Field(None, ge=0)
    """The same as a number of steps; overrides lr_warmup_ratio."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Clip the task gradient to this global norm (0: off). The orthogonality gradient is added after it."""
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    """Compute type of forward and backward (autocast, or the engine's own mixed precision); auto: bf16 on a GPU that
    computes in it, fp32 elsewhere."""
    logits_chunk: Literal["auto"] | Annotated[int, Field(ge=0)] = "auto"
    """Target tokens of a micro-batch whose logits are in memory at a time; 0: all; auto: as many as take about 1 GB
    (523 for 128,256 words), and all where a model changes its logits behind its head."""
    fsdp_prefetch: int = Field(0, ge=0)
    """Blocks whose weights FSDP2 gathers ahead of the one being computed, each at the price of its whole weights; 0:
    as torch does by itself, one."""
    group_by_length: bool = True
    """Put sequences of similar length into the same batch."""
    seed: int = Field(6, ge=0, lt=2**32)
    """Seed of initialisation and data order."""
    log_every: int = Field(10, ge=1)
    """Optimizer steps between console log lines; metrics.jsonl has every step."""
    max_nonfinite_steps: int = Field(20, ge=1)
    """End the run after so many steps in a row with a loss or gradients that are not finite; each is left out."""
    peer_timeout_seconds: float = Field(60.0, ge=2)
    """All processes end when one has not been heard of for so long: it, or its machine, was stopped."""
    trackers: tuple[
        Literal["tensorboard", "wandb", "trackio", "mlflow", "swanlab", "comet_ml", "aim", "clearml", "dvclive"], ...
    ] = ()
    """Experiment trackers to report to besides metrics.jsonl: those of accelerate. What each needs is installed by its
    own name."""
    checkpoint_every: int = Field(200, ge=0)
    """Optimizer steps between checkpoints; one is written before the first step and one at the end, too. 0: none."""
    keep_checkpoints: int = Field(2, ge=1)
    """Number of checkpoints kept; an old one goes after a new one is complete."""
    async_checkpoints: Switch = "auto"
    """Write checkpoints while training goes on, from a copy in CPU memory; auto: on GPUs, not on CPUs."""
    resume: str = Field("never", min_length=1)
    """auto: continue the run in output_dir, or start one; PATH: continue from that checkpoint or run; never."""
    max_restarts_at_step: int = Field(3, ge=0)
    """End a run that launchers or schedulers have started again so often from the same checkpoint."""

    @model_validator(mode="before")
    @classmethod
    def _of_every_recipe(cls, value: Any) -> Any:
        """From Python the settings that all recipes have will do for one that has more."""
        return value.model_dump(exclude_unset=True) if type(value) is TrainConfig is not cls else value

    @model_validator(mode="after")
    def _overwrite_or_resume(self) -> TrainConfig:
        if self.overwrite and self.resume == "auto":
            raise ValueError(
                "overwrite true with resume auto: one replaces the run in output_dir, the other continues it; leave "
                "one out (on the command line: --no-overwrite, or --resume never)"
            )
        return self

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> TrainConfig:
        batch, micro = self.batch_size, self.micro_batch_size
        if batch > micro and batch % micro and not self.micro_batch_tokens:
            divisor = next(size for size in range(micro, 0, -1) if batch % size == 0)
            raise ValueError(
                f"batch_size {batch} with micro_batch_size {micro}: a batch must be a whole number of micro-batches; "
                f"set micro_batch_size to {divisor} or batch_size to {batch - batch % micro}"
            )
        return self


class QuantizationConfig(Section):
    quantization: Literal["none", "nf4", "fp4", "int8", "fp8"] = "none"
    """Hold the frozen linear maps in 4 or 8 bits (bitsandbytes; fp8, float8_e4m3fn: torchao); embeddings, norms and
    head stay as they are."""
    double_quant: bool = True
    """Quantise the scales of 4-bit weights too: 4.13 instead of 4.5 bits per weight."""
    quant_storage: Literal["auto", "uint8", "float32", "bfloat16", "float16"] = "auto"
    """Type of the tensors that 4-bit weights are packed into; auto: that of precision, which every engine can shard."""

    @model_validator(mode="after")
    def _of_4_bit_weights(self) -> QuantizationConfig:
        for name, default in (("double_quant", True), ("quant_storage", "auto")):
            if (value := getattr(self, name)) != default and self.quantization not in ("nf4", "fp4"):
                raise ValueError(
                    f"{name} {str(value).lower()} with quantization {self.quantization}: it is for 4-bit weights; "
                    f"leave {name} out, or set quantization to nf4"
                )
        return self


class EvaluationConfig(Section):
    evaluate_before: bool = True
    """Also evaluate the model as it is before training."""
    eval_batch_size: int = Field(16, ge=1)
    """Sequences per process in one evaluation forward."""
    eval_every: int = Field(0, ge=0)
    """Optimizer steps between evaluations while training, on the validation rows; 0: none."""
    keep_best: str = ""
    """Export the model that had the best value of this score (loss, accuracy, ...) in an evaluation while training, of
    those that meet the budget; empty: the last one."""
    early_stopping: int = Field(0, ge=0)
    """End the training after so many evaluations in a row without a better keep_best, counted from the time on when
    the budget is met; 0: train to the end."""

    @model_validator(mode="after")
    def _evaluates_while_training(self) -> EvaluationConfig:
        if self.keep_best and not self.eval_every:
            raise ValueError(
                f"keep_best {self.keep_best} with eval_every 0: there is no evaluation to choose by; set eval_every"
            )
        if self.early_stopping and not self.keep_best:
            raise ValueError(
                f"early_stopping {self.early_stopping} without keep_best: which score is to get better? Set keep_best, "
                "to loss for one"
            )
        return self


class ExportConfig(Section):
    export_formats: tuple[ExportFormat, ...] = ("merged",)
    """What to write besides the adapter: a merged model for plain transformers; plain LoRA for PEFT and vLLM; PEFT's
    AdaLoRA. All can be had later from the run folder: adalora-dist export. Default: merged, if the method can be."""
    export_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the merged weights; auto: as the backbone's files."""
    lora_pad: bool = False
    """Plain LoRA with one rank and one alpha for all matrices, by adding zeros: for loaders that know no other."""
    merge_into: Literal["original", "dequantized"] = "original"
    """Weights that the adapters of a quantised run are added to: the backbone's own, or their quantised values."""
    verify_export: bool = True
    """Load the merged model afresh and compare its logits with the trained model's."""
    push_to_hub: str = ""
    """Upload the merged model to this Hub repository, NAMESPACE/NAME, when the run is done; empty: do not."""
    push_public: bool = False
    """Let the repository be public; one that does not exist is private otherwise."""
    push_revision: str = "main"
    """Branch that is pushed to."""
    base_license: str = ""
    """Licence of the backbone, for the model card: apache-2.0, llama3.1, ...; empty: the card calls it unknown."""

    @property
    def verifies_merged(self) -> bool:
        return "merged" in self.export_formats and self.verify_export

    @model_validator(mode="after")
    def _pushed(self) -> ExportConfig:
        if self.lora_pad and "lora" not in self.export_formats:
            forms = " ".join(self.export_formats) or "()"
            raise ValueError(f"lora_pad true with export_formats {forms}: there is no LoRA to pad; add lora")
        check_branch(self.push_revision)
        if self.push_to_hub:
            check_repo_id(self.push_to_hub)
            if "merged" not in self.export_formats:
                raise ValueError(
                    f"push_to_hub {self.push_to_hub} with export_formats {' '.join(self.export_formats) or '()'}: the "
                    "merged model is what would be pushed; add merged, or use adalora-dist push when the run is done"
                )
        return self


class RunConfig(Section):
    """What every recipe has; a recipe adds its ``data`` section in a subclass."""

    model: ModelConfig = ModelConfig()
    adapter: AnyMethodConfig = AdaLoraConfig()
    train: TrainConfig = TrainConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _quantized(self) -> RunConfig:
        method, storage = self.quantization.quantization, self.quantization.quant_storage
        compute = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}.get(self.train.precision)
        if method in ("nf4", "fp4") and storage not in ("auto", "uint8") and compute is None:
            raise ValueError(
                f"quant_storage {storage} with precision auto: both must be one type, and auto does not say which; set "
                "precision, or leave quant_storage out"
            )
        if method in ("nf4", "fp4") and storage not in ("auto", "uint8", compute):
            # FSDP2 and DeepSpeed cast all floating-point tensors to the type that they compute in.
            raise ValueError(
                f"quant_storage {storage} with precision {self.train.precision}: engines would convert the packed "
                f"weights to {compute} and so destroy them; must be auto, uint8 or {compute}; leave quant_storage out"
            )
        if method != "none" and self.adapter.trains_backbone:
            raise ValueError(
                f"quantization {method} with method {self.adapter.method}: quantised weights cannot be trained; set "
                "quantization to none, or method to adalora"
            )
        if method == "none" and self.export.merge_into == "dequantized":
            raise ValueError(
                "merge_into dequantized with quantization none: nothing was quantised; set merge_into to original, or "
                "quantization to nf4"
            )
        return self

    @model_validator(mode="after")
    def _mergeable_files(self) -> RunConfig:
        made = [form for form in self.export.export_formats if form in self.adapter.formats_from_files]
        if self.model.allow_pickle_weights and made:
            raise ValueError(
                f"allow_pickle_weights true with export_formats {made[0]}: merging goes through the backbone's "
                f"safetensors files; leave {made[0]} out of export_formats, or save the backbone again with "
                "save_pretrained"
            )
        return self

    @model_validator(mode="after")
    def _rules_of_the_method(self) -> RunConfig:
        method = self.adapter.method
        if self.adapter.trains_backbone and self.model.dtype in ("bfloat16", "float16"):
            raise ValueError(
                f"method {method} with dtype {self.model.dtype}: small updates of 16-bit weights are rounded away; set "
                "dtype to float32, and precision to bf16 for speed"
            )
        self._default_formats()
        if lacking := [form for form in self.export.export_formats if form not in self.adapter.formats]:
            others = ", ".join(name for name, other in METHODS.items() if other.formats.issuperset(lacking))
            remedy = "leave export_formats out" if "merged" in self.adapter.formats else "set export_formats to none"
            raise ValueError(
                f"export_formats {' '.join(lacking)} with method {method}: it cannot be written so ({others or 'none'} "
                f"can be); {remedy}, or set method to one that can"
            )
        self.adapter.check(self)
        check_compile(self)
        check_merging(self)
        check_unread(self)
        return self

    def _default_formats(self) -> None:
        """Where nobody has asked for a form, and no upload needs one: those of the default that the method has."""
        export = self.export
        if "export_formats" not in export.model_fields_set and not export.push_to_hub:
            made = tuple(form for form in export.export_formats if form in self.adapter.formats)
            if made != export.export_formats:
                self.__dict__["export"] = export.model_copy(update={"export_formats": made})

    @model_validator(mode="after")
    def _validation_rows_are_used(self) -> RunConfig:
        data = getattr(self, "data", None)
        if not isinstance(data, DataConfig) or data.always_validates:
            return self
        for name in ("eval_split", "eval_share"):
            if getattr(data, name) and not self.evaluation.eval_every:
                raise ValueError(
                    f"{name} {getattr(data, name)} with eval_every 0: no evaluation reads these rows; set eval_every, "
                    f"or leave {name} out"
                )
        return self


class PackedTrainConfig(TrainConfig):
    packing: Switch = "off"
    """Put rows of a micro-batch into one sequence where there would be padding, without their seeing each other; auto:
    where the model can, and at least a tenth of all positions is saved."""


class RepeatedTrainConfig(TrainConfig):
    seeds: tuple[int, ...] = ()
    """Repeat the whole run with each of these seeds, and report mean and standard deviation; default: seed alone."""
