"""A group of settings, and the kind of setting that a run may decide by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, model_validator
from pydantic.fields import FieldInfo

from adalora_dist.config.words import mistake
from adalora_dist.io.errors import UserError

if TYPE_CHECKING:
    from pydantic._internal._model_construction import ModelMetaclass
else:
    ModelMetaclass = type(BaseModel)  # which pydantic has no public name for


def _word(value: Any) -> Any:
    """YAML reads on and off as true and false."""
    return ("off", "on")[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class _CalledByHand(ModelMetaclass):
    """Where a section is made by a call, not from a file or flags, a mistake in it is one line as well."""

    model_fields: dict[str, FieldInfo]

    def __call__(cls, *arguments: Any, **settings: Any) -> Any:
        try:
            return super().__call__(*arguments, **settings)
        except ValidationError as error:
            raise UserError(mistake(cls.__name__, cls.model_fields, error)) from None


class Section(BaseModel, metaclass=_CalledByHand):
    """A group of settings; an unknown key, an infinite or nan number, or a list with a repetition is an error.

    Raises:
        UserError: of the first mistake in the arguments of a call.
    """

    model_config = ConfigDict(
        extra="forbid", validate_default=True, frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    @model_validator(mode="after")
    def _no_repetition(self) -> Section:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, tuple) and len(set(value)) < len(value):
                repeated = next(item for item in value if value.count(item) > 1)
                raise ValueError(f"{name} lists {repeated} more than once: remove the repetition")
        return self
