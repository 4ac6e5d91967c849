"""The complaint at exit of a plain loop that did not reach its budget: a hint where nothing else went wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

PROGRAM = """
import sys
import torch
from adalora_dist import UserError, attach
from adalora_dist.config.flags import user_errors
from tests.support.models import adapted_net, config

settings = config()
model = adapted_net(settings)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
hooks = attach(model, optimizer, settings, 24)
with user_errors():
    {ending}
"""
ENDINGS = {
    "pass": (0, "warning: adalora_dist: the method was never called"),
    "raise UserError('the data are not there')": (2, "error: the data are not there"),
    "raise KeyError('a row')": (1, "KeyError: 'a row'"),
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_after_an_error_the_last_line_is_the_cause(ending: str) -> None:
    program = PROGRAM.format(ending=ending)
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )
    code, last = ENDINGS[ending]
    assert process.returncode == code, process.stderr
    assert process.stderr.splitlines()[-1].startswith(last)
    assert ("warning: adalora_dist" in process.stderr) == (code == 0)
