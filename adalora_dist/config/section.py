"""A group of settings."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, model_validator


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
