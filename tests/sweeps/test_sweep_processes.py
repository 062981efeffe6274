"""Sweeps in separate processes: killed at any moment, and several at once.

`test_sweep.py` tests the same within one process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stopping import digests

from backward_lens_tl.sweeps.run import Sweep

pytestmark = pytest.mark.slow

ARGUMENTS = "--data facts --prompts 5 --shard-size 2 --layers -1 --matrices W_out --k 2 --quiet"
N_SHARDS = 3


def environment() -> dict[str, str]:
    # The last bits of sums depend on the number of threads, which launchers set.
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **own}


def ran(command: list[str], timeout: float = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=timeout, check=False
    )


def script(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


# A process forks before each sweep, so that the libraries are imported once.
DRIVER = '''
import os, shlex, signal, socket, sys
from contextlib import contextmanager
from pathlib import Path

import accelerate, accelerate.utils, pandas, pyarrow.parquet, tqdm.auto
import torch
torch.set_num_threads(1)
from backward_lens_tl import load_facts_model
from backward_lens_tl.files import storage
from backward_lens_tl.runs import run, shards
from backward_lens_tl.data.readers import read_records
from backward_lens_tl.sweeps.config import SweepConfig
from backward_lens_tl.sweeps.run import sweep

out = Path(sys.argv[1])
records, model = read_records("facts"), load_facts_model()
settings = SweepConfig(prompts=5, shard_size=2, layers=-1, matrices="W_out", k=2)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def forked(action):
    """The status of an action in a child of this process."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed(name, moment, when):
    """A sweep that is killed as it writes its n-th file: before, or once it is in place."""
    real, left = storage.replacing, iter(range(moment))

    @contextmanager
    def replacing(path):
        is_last = next(left, None) is None
        with real(path) as partial:
            yield partial
            if is_last and when == "written":
                die()
        if is_last:
            die()

    storage.replacing = shards.replacing = replacing
    sweep(model, records, out / name, settings, progress=False)


def whole(name):
    sweep(model, records, out / name, settings, progress=False)


def of_two(rank, port):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def both(action):
    """The statuses of an action in two processes of one launch."""
    port = free_port()

    def ranked(rank):
        of_two(rank, port)
        action(rank)

    first = os.fork()
    if first == 0:
        os._exit(forked(lambda: ranked(0)))
    second = forked(lambda: ranked(1))
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]), second


def failing(rank):
    """A sweep whose first process cannot create the folder."""
    def refused(path, text):
        raise OSError("no room")

    if rank == 0:
        run.write_text = refused
    whole("failed")


# Every moment of a sweep of three shards: run.json, and four tables of each shard.
for moment in range(1 + 4 * 3):
    for when in ("written", "placed"):
        name = f"{moment}-{when}"
        assert forked(lambda: killed(name, moment, when)) == -signal.SIGKILL, name
        if moment % 3 == 0 and (out / name / "run.json").exists():
            # a second kill, two files on
            forked(lambda: killed(name, 1, when))
        status = forked(lambda: whole(name))
        assert status == 0, name
assert forked(lambda: whole("whole")) == 0

assert both(lambda rank: whole("two")) == (0, 0)
assert both(failing) == (1, 1)
'''


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of sweeps killed at every moment, and of two processes."""
    folder = tmp_path_factory.mktemp("driven")
    done = ran([sys.executable, "-c", DRIVER, str(folder)])
    assert done.returncode == 0, done.stderr[-3000:]
    # The other process did not wait for the one that failed.
    assert "SweepError: the first process failed: no room" in done.stderr
    return folder


@pytest.fixture(scope="module")
def commanded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sweep of `ARGUMENTS` by one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    done = ran(
        [sys.executable, "-m", "backward_lens_tl", "sweep", *ARGUMENTS.split(), "--out", out]
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"5 prompts analysed, 0 rejected: {out}\n"
    return out


def test_killed_at_every_moment_it_gives_the_same_result(driven: Path):
    expected = digests(driven / "whole")
    assert len(expected) == 4 * N_SHARDS
    names = [
        f"{moment}-{when}" for moment in range(1 + 4 * N_SHARDS) for when in ("written", "placed")
    ]
    for name in names:
        assert digests(driven / name) == expected, name
        assert Sweep.load(driven / name).is_complete


def test_two_processes_give_the_same_as_one(driven: Path):
    assert digests(driven / "two") == digests(driven / "whole")
    logs = [(driven / "two" / f"log-{rank}.txt").read_text() for rank in range(2)]
    for rank, log in enumerate(logs):
        own = list(range(rank, N_SHARDS, 2))
        assert f"process {rank} of 2: {len(own)} of the {N_SHARDS} shards that are left" in log
        written = [int(line.split()[3][:-1]) for line in log.splitlines() if " shard " in line]
        assert written == own


def test_processes_started_by_torchrun(driven: Path, tmp_path: Path):
    out = tmp_path / "out"
    launch = [script("torchrun"), "--nproc_per_node", "2", "-m", "backward_lens_tl", "sweep"]
    done = ran([*launch, *ARGUMENTS.split(), "--out", str(out)])
    assert done.returncode == 0, done.stderr
    # One process prints for both.
    assert done.stdout == f"5 prompts analysed, 0 rejected: {out}\n"
    assert digests(out) == digests(driven / "whole")
    assert sorted(file.name for file in out.glob("log-*")) == ["log-0.txt", "log-1.txt"]


def test_processes_started_by_accelerate(commanded: Path, tmp_path: Path):
    launch = [script("accelerate"), "launch", "--num_processes", "2"]
    for name, options in (("many", ["--multi_gpu"]), ("cpu", ["--cpu"])):
        out = tmp_path / name
        own = [*launch, *options, "-m", "backward_lens_tl", "sweep", *ARGUMENTS.split()]
        done = ran([*own, "--out", str(out)])
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == f"5 prompts analysed, 0 rejected: {out}"
        assert digests(out) == digests(commanded)
    assert (tmp_path / "many" / "log-1.txt").read_text().count(" shard ") == 1


def test_refused_processes_exit(commanded: Path):
    """They do not wait for each other forever."""
    launch = [script("torchrun"), "--nproc_per_node", "2", "-m", "backward_lens_tl", "sweep"]
    done = ran([*launch, *ARGUMENTS.split(), "--k", "3", "--out", str(commanded)], timeout=120)
    assert done.returncode != 0
    assert done.stdout == ""
    assert "holds a sweep of other settings (config): k was 2, is 3" in done.stderr


def test_one_process_resumes_the_sweep_of_two(commanded: Path, tmp_path: Path):
    out = tmp_path / "out"
    launch = [script("torchrun"), "--nproc_per_node", "2", "-m", "backward_lens_tl", "sweep"]
    both = [*launch, *ARGUMENTS.split(), "--out", str(out)]
    assert ran(both).returncode == 0
    for shard in (1, 2):
        (out / "prompts" / f"shard-{shard:06d}.parquet").unlink()
    alone = [sys.executable, "-m", "backward_lens_tl", "sweep", *ARGUMENTS.split()]
    assert ran([*alone, "--out", str(out)]).returncode == 0
    assert digests(out) == digests(commanded)


def test_all_of_counterfact_killed_twice(shared: Path, stories_folder: Path, tmp_path: Path):
    """1,919 real records through a real model; `-s` shows the throughput."""
    data = shared / "data" / "counterfact" / "counterfact_flat_1919.json"
    command = [sys.executable, "-m", "backward_lens_tl", "sweep", "--model", str(stories_folder)]
    command += ["--data", str(data), "--multi-token", "first", "--quiet", "--out"]

    def finished(folder: Path) -> int:
        return len(list((folder / "prompts").glob("shard-*.parquet")))

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    began = time.perf_counter()
    assert ran([*command, str(whole)], timeout=900).returncode == 0
    seconds = time.perf_counter() - began
    for wanted in (7, 19):
        with subprocess.Popen(
            [*command, str(stopped)],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            while finished(stopped) < wanted and process.poll() is None:
                time.sleep(0.05)
            assert process.poll() is None
            process.send_signal(signal.SIGKILL)
        assert not Sweep.load(stopped).is_complete
    done = ran([*command, str(stopped)], timeout=900)
    assert done.returncode == 0, done.stderr
    assert digests(stopped) == digests(whole)
    found = Sweep.load(stopped)
    rows = sorted([*found.prompts()["prompt"], *found.rejects()["prompt"]])
    assert rows == list(range(len(json.loads(data.read_text(encoding="utf-8"))))) == [*range(1919)]
    runs = [line for line in (whole / "log-0.txt").read_text().splitlines() if " in " in line]
    computing = sum(float(line.split()[-2]) for line in runs)
    rate = f"{seconds:.0f} s in all, {1919 / computing:.0f} prompts per s once loaded"
    sys.stdout.write(f"\n{done.stdout.strip()}\n{rate}\n")
