"""An export, a push and a run that goes on, each killed again and again at a random time, while a reader looks on.

Each function ends with an error at the first half thing that the reader sees. It returns how many were killed, and how
many exports, pushes or runs were brought to their ends afterwards, and found to be what they would have been without.
"""

from __future__ import annotations

import math
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch

from adalora_dist.artifacts.checkpoints.files import Damaged, checkpoints_in, step_of, verify
from adalora_dist.artifacts.export import merge
from adalora_dist.artifacts.hub.push import push
from adalora_dist.backbones.load import load_tokenizer
from adalora_dist.config.sections import ModelConfig
from adalora_dist.io.publish import discard
from adalora_dist.methods.update import AdapterWeights
from tests.support.faulty_runs import Fault, Ranks, run
from tests.support.kills import forked, killed_at_random
from tests.support.local_hub import TOKEN, LocalHub, write_run
from tests.support.tiny_language_model import byte_tokenizer, tiny_llama

MATRIX = "model.layers.0.self_attn.q_proj"


def _timed(action: Callable[[], None]) -> float:
    """Seconds that it takes in a process of its own, undisturbed."""
    begin = time.monotonic()
    _, status = os.waitpid(forked(action), 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return time.monotonic() - begin


def exports(folder: Path, num_trials: int, seed: int = 0) -> tuple[int, int]:
    """A merged model: none, or every byte of it."""
    base, out, dice = folder / "base", folder / "merged", random.Random(seed)
    model = tiny_llama(260)
    model.save_pretrained(base, max_shard_size="20KB")
    byte_tokenizer().save_pretrained(base)
    tokenizer = load_tokenizer(ModelConfig(name=str(base)))
    d_out, d_in = model.get_submodule(MATRIX).weight.shape
    adapters = [AdapterWeights(MATRIX, torch.ones(d_out, 2), torch.ones(2), torch.ones(2, d_in), 0.5, False)]

    def export() -> None:
        merge(adapters, base, out, show_progress=False, tokenizer=tokenizer)

    def contents() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in out.iterdir()}

    seconds = _timed(export)
    expected = contents()
    discard(out)

    def look() -> None:
        assert not out.exists() or contents() == expected

    num_killed = 0
    for _ in range(num_trials):
        code = killed_at_random(export, look, seconds, dice)
        assert code in (0, None)
        num_killed += code is None
        discard(out)
    export()  # what was killed before is not in its way
    assert contents() == expected and sorted(os.listdir(folder)) == ["base", "merged"]
    return num_killed, 1


def pushes(folder: Path, num_trials: int, seed: int = 0) -> tuple[int, int]:
    """A repository: nothing in it, or all; and the same push, made again, brings what is missing in one commit."""
    from huggingface_hub import constants

    dice, exported = random.Random(seed), write_run(folder / "run", draw=False)
    wanted = {path.name: path.read_bytes() for path in (exported / "merged").iterdir()}
    hub = LocalHub(folder)

    def push_to(repo: str) -> None:
        os.environ.update(HF_TOKEN=TOKEN, HF_HUB_DISABLE_PROGRESS_BARS="1")
        constants.ENDPOINT, constants.HF_HUB_OFFLINE = hub.address, False
        push(exported, repo, say=lambda line: None)

    num_killed = 0
    try:
        seconds = _timed(lambda: push_to("somebody/undisturbed"))
        whole = hub.names(repo="somebody/undisturbed")
        assert whole == {*wanted, "README.md"}
        for trial in range(num_trials):
            repo = f"somebody/trial-{trial}"

            def look(repo: str = repo) -> None:
                assert hub.names(repo=repo) in (set(), whole)

            code = killed_at_random(lambda repo=repo: push_to(repo), look, seconds, dice)  # type: ignore[misc]
            assert code in (0, None)
            num_killed += code is None
            _timed(lambda repo=repo: push_to(repo))  # type: ignore[misc]
            found = hub.files(repo=repo)
            assert {name: found.get(name) for name in wanted} == wanted and hub.num_pushes(repo) == 1
    finally:
        hub.stop()
    return num_killed, num_trials


def resumes(folder: Path, num_trials: int, seed: int = 0) -> tuple[int, int]:
    """One run after the other that is killed and goes on, until it has ended; each as if nothing had been. The last one
    is left alone when there have been enough kills.

    Every checkpoint that has its name is whole whenever the reader looks, and there always is one from the first on.
    """
    dice, changes = random.Random(seed), {"checkpoint_every": 1, "resume": "auto"}

    def start(name: str, attempt: int) -> Ranks:
        return Ranks(1, folder / name / f"attempt-{attempt}", run, folder / name, "single", Fault(), changes)

    def look(root: Path, has_begun: bool) -> bool:
        found = [path for path in (checkpoints_in(root) if root.is_dir() else ()) if step_of(path) is not None]
        for path in found:
            try:
                verify(path)
            except Damaged:
                assert not path.exists(), f"{path} is half a checkpoint"  # else it was removed, as an old one is
        assert found or not has_begun
        return bool(found) or has_begun

    begin = time.monotonic()
    [ended] = start("undisturbed", 0).wait()
    seconds = time.monotonic() - begin
    assert ended.code == 0, ended.log
    expected = torch.load(folder / "undisturbed" / "final.pt", weights_only=True)
    num_killed = number = attempt = 0
    has_begun = False
    while num_killed < num_trials or attempt > 0:
        name, has_begun = f"run-{number}", attempt > 0 and has_begun
        patience = dice.uniform(0, seconds) if num_killed < num_trials else math.inf
        ranks, deadline = start(name, attempt), time.monotonic() + patience
        flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
        while time.monotonic() < deadline and os.waitid(os.P_PID, ranks.pids[0], flags) is None:
            has_begun = look(folder / name / "run" / "checkpoints", has_begun)
        ranks.kill()
        [ended] = ranks.wait()
        has_begun = look(folder / name / "run" / "checkpoints", has_begun)
        attempt += 1
        if ended.code == -signal.SIGKILL:
            num_killed += 1
            continue
        assert ended.code == 0, ended.log
        final = torch.load(folder / name / "final.pt", weights_only=True)
        assert final.keys() == expected.keys() and all(torch.equal(final[key], expected[key]) for key in final)
        number, attempt = number + 1, 0
    return num_killed, number
