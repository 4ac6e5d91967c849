"""A group of settings, and the kind of setting that a run may decide by itself."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator


def _word(value: Any) -> Any:
    """YAML reads on and off as true and false."""
    return ("off", "on")[value] if isinstance(value, bool) else value


Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_word)]


class Section(BaseModel):
    """A group of settings; an unknown key, an infinite or nan number, or a list with a repetition is an error."""

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
