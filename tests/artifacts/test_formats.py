"""What runs can be exported as: configuration, command and writers know the same names."""

from __future__ import annotations

from typing import get_args

from adalora_dist.artifacts.formats import FORMATS
from adalora_dist.config.formats import ADAPTER_FORMATS, EXPORT_FORMATS, ExportFormat
from adalora_dist.config.sections import ExportConfig


def test_names_and_writers_agree() -> None:
    names = get_args(ExportFormat)
    assert list(names) == list(EXPORT_FORMATS) == list(FORMATS) and len(names) >= 3
    assert [name for name in names if FORMATS[name].is_adapter] == list(ADAPTER_FORMATS)
    assert ExportConfig(export_formats=names).export_formats == names
    assert all(form.is_adapter for form in FORMATS.values() if form.vllm_options)
