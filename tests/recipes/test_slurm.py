"""launch/slurm.sh with SLURM's commands replaced by small ones: what would each node run?"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.support.limits import HANG_SECONDS
from tests.support.paths import ROOT

RECIPE = [
    "recipes/llama_commonsense.py",
    "--config",
    "recipes/configs/llama_commonsense_llama_7b.yaml",
    "--data",
    "a b",
]
COMMANDS = {
    "scontrol": 'if [[ $1 == requeue ]]; then echo "queued $2"; else printf "node7\\nnode8\\n"; fi',
    # One task per node, one after the other, with what srun tells it.
    "srun": 'while [[ $1 == --* ]]; do shift; done\nfor SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
    "accelerate": """printf "%s\\n" START "$@" "threads $OMP_NUM_THREADS"
if [[ -n ${SIGNALLED:-} ]]; then kill -USR1 $$; echo '{}' >"$ADALORA_DIST_STATUS_FILE"; fi
exit "${CODE:-0}" """,
}
JOB = {
    "SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_ON_NODE": "64",
}  # fmt: skip


def submit(folder: Path, *arguments: str, **changes: str | None) -> subprocess.CompletedProcess[str]:
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_") and k != "OMP_NUM_THREADS"}
    environment |= {"PATH": f"{folder}:{os.environ['PATH']}"} | JOB
    environment = {k: v for k, v in (environment | changes).items() if v is not None}
    command = ["bash", str(ROOT / "launch" / "slurm.sh"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False
    )


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_every_node_runs_accelerate_with_its_own_rank(tmp_path, engine):
    result = submit(tmp_path, f"launch/accelerate/{engine}.yaml", *RECIPE)
    assert result.returncode == 0, result.stderr
    first, *nodes = result.stdout.split("START\n")
    assert len(nodes) == 2
    assert "2 nodes x 8 processes, main process at node7:21234" in first
    for rank, output in enumerate(nodes):
        launch, *command, threads = output.splitlines()
        assert (launch, threads) == ("launch", "threads 8")
        parsed = launch_command_parser().parse_args(command)
        assert parsed.config_file == f"launch/accelerate/{engine}.yaml"
        assert (parsed.num_machines, parsed.num_processes, parsed.machine_rank) == (2, 16, rank)
        assert (parsed.main_process_ip, parsed.main_process_port) == ("node7", 21234)
        assert parsed.deepspeed_multinode_launcher == "standard"
        assert [parsed.training_script, *parsed.training_script_args] == RECIPE


def test_nodes_without_gpus(tmp_path):
    result = submit(tmp_path, "launch/accelerate/ddp.yaml", *RECIPE, SLURM_GPUS_ON_NODE=None, PROCESSES_PER_NODE="3")
    assert "--num_processes\n6\n" in result.stdout and "threads 21" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        ([], {}, "usage: sbatch"),
        (["launch/accelerate/fsdp3.yaml", *RECIPE], {}, "fsdp3.yaml is not a file"),
        (["launch/accelerate/fsdp2.yaml", "--config"], {}, "--config is not a file: give a recipe"),
        (["launch/accelerate/fsdp2.yaml", *RECIPE], {"SLURM_JOB_ID": None}, "submit this file with sbatch"),
        (["launch/accelerate/fsdp2.yaml", *RECIPE], {"SLURM_GPUS_ON_NODE": None}, "add --gpus-per-node N"),
    ],
)
def test_mistakes_are_named_before_anything_runs(tmp_path, arguments, changes, message):
    result = submit(tmp_path, *arguments, **changes)
    assert result.returncode == 2 and message in result.stderr and not result.stdout


def test_a_job_that_was_stopped_by_a_signal_is_queued_again(tmp_path):
    """The signal itself reaches the launcher, too, which must outlive it."""
    result = submit(tmp_path, "launch/accelerate/ddp.yaml", *RECIPE, SIGNALLED="1", CODE="1", TMPDIR=str(tmp_path))
    assert result.returncode == 1 and "queued 41234" in result.stdout, result.stderr
    assert not list(tmp_path.glob("*.json")) and not list(tmp_path.glob("adalora-dist-*"))


def test_the_status_lies_in_a_private_folder_that_nobody_can_foretell(tmp_path):
    """A link that somebody has put where the file would be is not followed, and nobody else's file is believed."""
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / "adalora-dist-41234.json").symlink_to(target)
    recipe = 'stat -c "%a %n" "$(dirname "$ADALORA_DIST_STATUS_FILE")" >>"$SEEN"'
    accelerate = f"{recipe}\n{COMMANDS['accelerate']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(COMMANDS, "accelerate", accelerate)
        changes = {"SIGNALLED": "1", "TMPDIR": str(tmp_path), "SEEN": str(tmp_path / "seen")}
        for _ in range(2):
            submit(tmp_path, "launch/accelerate/ddp.yaml", *RECIPE, **changes)
    seen = [line.split() for line in (tmp_path / "seen").read_text().splitlines()]
    assert {mode for mode, _ in seen} == {"700"} and len({name for _, name in seen}) == 2
    assert target.read_text() == "mine" and (tmp_path / "adalora-dist-41234.json").is_symlink()


def test_without_room_for_the_status_it_is_one_line(tmp_path):
    result = submit(tmp_path, "launch/accelerate/ddp.yaml", *RECIPE, TMPDIR=str(tmp_path / "missing"))
    assert result.returncode == 2 and "slurm.sh: no folder for the status: set TMPDIR" in result.stderr


def test_a_job_that_failed_is_not_queued_again(tmp_path):
    result = submit(tmp_path, "launch/accelerate/ddp.yaml", *RECIPE, CODE="3", TMPDIR=str(tmp_path))
    assert result.returncode == 3 and "queued" not in result.stdout
