"""What the settings of all methods have in common, and what the rest of a configuration may ask of a method."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from adalora_dist.config.budget import parse_budget
from adalora_dist.config.section import Section

METHODS: dict[str, type[MethodConfig]] = {}
"""Every method's settings by the method's name; filled in ``__init__.py``."""

FOREIGN = "foreign_setting"
"""Type of pydantic's error for a setting that another method has."""


def _regular_expressions(patterns: tuple[str, ...]) -> tuple[str, ...]:
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{pattern}' is not a regular expression ({error}): correct or escape it") from None
    return patterns


ModulePatterns = Annotated[tuple[str, ...], AfterValidator(_regular_expressions)]
"""Names of modules, or regular expressions that match them."""


def _budget_text(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):  # as YAML reads 331776
        value = str(value)
    if isinstance(value, str):
        parse_budget(value)
    return value


class MethodConfig(Section):
    """Settings of a method. A subclass has a default for ``method``, its settings, and what it says of itself below;
    the first line of its docstring tells ``--help`` what it trains.

    Raises:
        ValidationError: of type ``FOREIGN`` for a setting that this method lacks and another has.
    """

    method: str
    """What is trained."""
    train_modules: ModulePatterns = ()
    """Modules trained in full besides the adapters, by name; task-head: all that lies outside the backbone."""

    # What the rest asks of a method instead of its name.
    has_adapters: ClassVar[bool] = False
    adapts_ranks: ClassVar[bool] = False
    """Whether there is a budget that falls."""
    trains_backbone: ClassVar[bool] = False
    """Whether the backbone's own weights change, which must then be float32 and not quantised."""
    compiles: ClassVar[bool] = True
    """Whether a forward with its adapters is one graph to torch.compile."""
    merges: ClassVar[bool] = False
    """Whether texts can be generated with its adapters added to their weights."""
    formats: ClassVar[frozenset[str]] = frozenset({"merged"})
    """What it can be exported as: merged, lora, peft."""
    formats_from_files: ClassVar[frozenset[str]] = frozenset({"merged"})
    """Those that are written with the base's safetensors files at hand."""

    @property
    def size(self) -> str:
        """How large its adapters are, in words."""
        return ""

    @property
    def num_positions(self) -> int:
        """Positions of the model that are not left to the text."""
        return 0

    @property
    def start_text(self) -> str | None:
        """What the model reads before the first step, for a start that is made of it."""
        return None

    @classmethod
    def resolved(cls, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings``, with what follows from others in the place of None: what two runs are compared by."""
        return dict(settings)

    def check(self, run: Any) -> None:
        """Rules of this method over settings of its own, or over those of several sections.

        Args:
            run: the ``RunConfig`` that this is the ``adapter`` section of.

        Raises:
            ValueError: one line with the settings, the rule and the remedy.
        """

    @model_validator(mode="before")
    @classmethod
    def _no_foreign_settings(cls, values: Any) -> Any:
        errors: list[InitErrorDetails] = []
        for name, value in values.items() if isinstance(values, dict) else ():
            if name not in cls.model_fields and (owners := methods_with(name)):
                owner = owners[0] if len(owners) == 1 else "one that has"
                message = {"message": f"{foreign_setting(cls, name)}, or set method to {owner}"}
                errors.append(
                    {"type": PydanticCustomError(FOREIGN, "{message}", message), "loc": (name,), "input": value}
                )
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return values


class SizedConfig(MethodConfig):
    """A method whose number of trained parameters can be asked for."""

    budget: Annotated[str | None, BeforeValidator(_budget_text, json_schema_input_type=str | float | None)] = None
    """Parameters that the method may train at most, train_modules not counted: 0.3M, 40K, 331776, or 0.32% of the
    model's. The largest ranks within it follow. With a preset, a word of its table."""

    sized_by: ClassVar[tuple[str, ...]] = ()
    """Settings that say how large the adapters are, which a budget says instead."""

    def sized(self, settings: Mapping[str, Any]) -> Self:
        """With what a budget has come to in its place: values of settings that are in ``sized_by``."""
        return self.model_copy(update={"budget": None, **settings})

    @classmethod
    def give_way(cls, values: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
        """Of the section's values, as they were given, those that count with a budget.

        Args:
            kept: names that were given where the budget was, or later; others of ``sized_by`` are dropped.
        """
        return {name: value for name, value in values.items() if name in kept or name not in cls.sized_by}

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if self.budget is not None and (given := [n for n in self.sized_by if n in self.model_fields_set]):
            raise ValueError(
                f"budget {self.budget} with {given[0]} {getattr(self, given[0])}: both say how large the adapters are; "
                "leave one of them out (on the command line: --budget none)"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_follows(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = handler(self)
        dropped = self.sized_by if self.budget is not None else ()
        return {name: value for name, value in content.items() if name not in dropped}


class TargetsConfig(SizedConfig):
    """A method that puts an adapter around each of many matrices."""

    init_rank: int = Field(12, ge=1)
    """Rank r of every adapted matrix; where ranks adapt, at the start."""
    targets: ModulePatterns = Field(("all-linear",), min_length=1)
    """Matrices to adapt: module names (q_proj), dotted names, regular expressions, or all-linear."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the input of the adapter branch (the paper uses 0)."""

    has_adapters: ClassVar[bool] = True
    sized_by: ClassVar[tuple[str, ...]] = ("init_rank",)

    @property
    def size(self) -> str:
        return f"rank {self.init_rank}"

    def sized(self, settings: Mapping[str, Any]) -> Self:
        """Where there is an alpha, at the same scale, so that methods and budgets differ in nothing but size."""
        made = super().sized(settings)
        return made.model_copy(update=self._same_scale(dict(self), made.init_rank))

    @classmethod
    def give_way(cls, values: Mapping[str, Any], kept: Collection[str]) -> dict[str, Any]:
        """An alpha that was meant for a rank that is dropped becomes that of the default rank, at the same scale."""
        made = super().give_way(values, kept)
        follows = "init_rank" not in made and "init_rank" in values and "alpha" not in kept
        return made | (cls._same_scale(values, cls.model_fields["init_rank"].default) if follows else {})

    @classmethod
    def _same_scale(cls, values: Mapping[str, Any], rank: int) -> dict[str, float]:
        """The alpha that scales as that of ``values`` does at their init_rank; {}: there is none, or no number."""
        if (field := cls.model_fields.get("alpha")) is None:
            return {}
        alpha, before = values.get("alpha", field.default), values["init_rank"]
        if not all(isinstance(number, int | float) and number > 0 for number in (alpha, before)):
            return {}
        return {"alpha": alpha * (math.sqrt(rank / before) if values.get("rslora") is True else rank / before)}


class ScaledConfig(TargetsConfig):
    """A method that adds a product of two thin matrices, times a scale, to each of many matrices."""

    alpha: float = Field(16.0, gt=0)
    """The branch is scaled by alpha / init_rank for the whole run; with budget, by alpha / 12 at any rank."""
    rslora: bool = False
    """Scale the branch by alpha / sqrt(init_rank) instead (rsLoRA), so that higher ranks learn no more slowly."""

    @property
    def scale(self) -> float:
        """s, by which the branch is multiplied for the whole run."""
        return self.alpha / (math.sqrt(self.init_rank) if self.rslora else self.init_rank)


class TripletConfig(ScaledConfig):
    """One whose products are sums of triplets."""

    lora_plus_ratio: float = Field(1.0, gt=0)
    """Learning rate of P (LoRA's B) over that of everything else that is trained (LoRA+ takes 16)."""


class LowRankConfig(TripletConfig):
    """One that adds nothing but them."""

    init_from: str | None = Field(None, min_length=1)
    """Folder of a LoRA or AdaLoRA adapter of PEFT whose update the adapters start with, instead of 0."""

    merges: ClassVar[bool] = True
    formats: ClassVar[frozenset[str]] = frozenset({"merged", "lora", "peft"})


def methods_with(setting: str) -> list[str]:
    """Names of the methods that have a setting of this name, in the order of ``METHODS``."""
    return [name for name, config in METHODS.items() if setting in config.model_fields]


def foreign_setting(config: type[MethodConfig], name: str) -> str:
    """What to say of a setting that ``config`` lacks: "method lora has no target_rank (adalora has): leave it out"."""
    *others, last = methods_with(name)
    listed = f"{', '.join(others)} and {last} have" if others else f"{last} has"
    return f"method {config.model_fields['method'].default} has no {name} ({listed}): leave it out"
