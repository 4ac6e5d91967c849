"""What the ``data`` sections of all recipes have: rows that cannot be used, validation rows, columns of other names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, model_validator
from pydantic_core import PydanticCustomError

from adalora_dist.config.row_files import names_file
from adalora_dist.config.section import Section


class DataConfig(Section):
    bad_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used: error names file, row and field; skip leaves it out and counts it in run.json."""
    eval_split: str = ""
    """Rows for evaluations while training (eval_every): a file, or the name of a split of the data, such as
    validation; empty: a share of the training rows. Where data is one file: the rows for all evaluations."""
    eval_share: float | None = Field(None, gt=0, lt=1)
    """Share of the training rows held out for that, by their content. Default: 0.05."""

    @property
    def always_validates(self) -> bool:
        """Whether there are validation rows without evaluations while training, too."""
        return names_file(getattr(self, "source", ""))

    @model_validator(mode="after")
    def _one_validation(self) -> DataConfig:
        if self.eval_split and self.eval_share is not None:
            raise ValueError(
                f"eval_split {self.eval_split} with eval_share {self.eval_share:g}: the validation rows are one or the "
                "other; leave one out"
            )
        return self


@dataclass(frozen=True)
class Known:
    """Checks the name of a task: built-in and public data sets have these; data of one's own has any.

    For ``Annotated[str, AfterValidator(Known(names))]``, behind the setting ``source``.
    """

    names: tuple[str, ...]

    def __call__(self, name: str, info: ValidationInfo) -> str:
        if name not in self.names and info.data.get("source") in ("", "hub"):
            raise PydanticCustomError("unknown_task", "no such task")
        return name


class ColumnsConfig(DataConfig):
    """Rows of texts whose columns may have other names."""

    known_fields: ClassVar[tuple[str, ...]] = ()
    """What a row can have, by the names that ``columns`` gives to others."""

    columns: tuple[str, ...] = ()
    """Columns that have other names, FIELD=COLUMN[,FIELD=COLUMN]: instruction=question,output=answer."""

    @property
    def column_of(self) -> dict[str, str]:
        """``columns``, by field."""
        pairs = (pair.partition("=") for word in self.columns for pair in word.split(","))
        return {field.strip(): column.strip() for field, _, column in pairs}

    @model_validator(mode="after")
    def _columns_are_pairs(self) -> ColumnsConfig:
        for field, column in self.column_of.items():
            if field not in self.known_fields or not column:
                raise ValueError(
                    f"columns {' '.join(self.columns)}: {field}={column} must be FIELD=COLUMN with FIELD one of "
                    f"{', '.join(self.known_fields)}; write {self.known_fields[0]}=COLUMN"
                )
        if self.columns and getattr(self, "source", "") in ("", "hub"):
            raise ValueError(
                f"columns {' '.join(self.columns)} with data {getattr(self, 'source', '') or 'that is built in'}: its "
                "columns are known; give --data with rows of your own, or leave columns out"
            )
        return self
