"""A recipe of which one process is killed in its first attempt; started like any other, by any launcher.

Environment: FAILS=RANK:STEP:SIGNAL, the process that gets it while that step is logged. The flags are those of
llama_commonsense.
"""

from __future__ import annotations

import os
import runpy
import sys
from typing import Any

from adalora_dist.io.launchers import is_restarted
from tests.support.tiny_project import RECIPE


def _fail(rank: int, step: int, number: int) -> None:
    from adalora_dist.training.run_folder import RunFolder

    log = RunFolder.log

    def failing(folder: RunFolder, record: Any) -> None:
        if record.get("step") == step and os.environ.get("RANK", "0") == str(rank):
            os.kill(os.getpid(), number)
        log(folder, record)

    RunFolder.log = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    if (fails := os.environ.get("FAILS")) and not is_restarted():
        _fail(*map(int, fails.split(":")))
    sys.argv[0] = str(RECIPE)
    runpy.run_path(str(RECIPE), run_name="__main__")
