"""The example over several processes: real processes on this machine, and real deaths."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from examples.training import multi_process

PROGRAM = pathlib.Path(multi_process.__file__)
SMOKE = ["--epochs", "8", "--switch-at", "4", "--batch-size", "64", "--micro-batches", "4", "--name", "smoke"]
STARTED_WITHIN, STOPPED_WITHIN = 180, 30  # seconds; the second is what the program promises


class Command:
    """The program as a user runs it, in a folder, with its output in files."""

    def __init__(self, folder, *arguments):
        self.folder = folder
        self.output = folder / f"output-{len(list(folder.glob('output-*')))}"
        with self.output.open("w") as file:
            command = [sys.executable, str(PROGRAM), *SMOKE, *arguments]
            environment = os.environ | {"JAX_PLATFORMS": "cpu"}
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=file)

    def wait_until(self, condition):
        deadline = time.monotonic() + STARTED_WITHIN
        while not (result := condition()):
            assert self.process.poll() is None, f"it ended too early: {self.output.read_text()}"
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.01)
        return result

    def workers(self):
        """Process ids by rank."""
        found = self.wait_until(lambda: re.findall(r"process (\d+): pid (\d+)(?=[,\n])", self.output.read_text()))
        return {int(rank): int(pid) for rank, pid in found}

    def wait_for_a_checkpoint(self):
        self.wait_until(lambda: any(path.name.isdecimal() for path in self.folder.glob("checkpoints/*")))

    def stops(self, within=STOPPED_WITHIN):
        """Exit status and last line."""
        status = self.process.wait(within)
        return status, self.output.read_text().splitlines()[-1]


@pytest.fixture
def start():
    with contextlib.ExitStack() as stack:

        def start(folder, *arguments):
            command = Command(folder, *arguments)
            stack.callback(command.process.wait)
            stack.callback(command.process.kill)
            return command

        yield start


def numbers(folder):
    """The final numbers of a run: the same to the last bit."""
    results = json.loads((folder / "runs/smoke/results.json").read_text())
    return {name: results[name] for name in ("history", "train_loss", "test_accuracy", "params_norm")}


def run(folder, *arguments):
    command = Command(folder, *arguments)
    try:
        status, _ = command.stops(within=STARTED_WITHIN)
        assert status == 0, command.output.read_text()
    finally:
        command.process.kill()
        command.process.wait()
    return numbers(folder)


def is_gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.fixture(scope="module")
def lonely_rank(tmp_path_factory):
    arguments = ["--coordinator", "127.0.0.1:1", "--processes", "2", "--rank", "1", "--start-timeout", "1"]
    command = Command(tmp_path_factory.mktemp("lonely"), *arguments)
    yield command
    command.process.kill()
    command.process.wait()


@pytest.fixture(scope="module")
def unbroken_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run(folder, "--processes", "2", "--checkpoint-dir", "checkpoints")
    return folder


@pytest.fixture(scope="module")
def unbroken(unbroken_folder):
    return numbers(unbroken_folder)


@pytest.mark.heavy
@pytest.mark.usefixtures("lonely_rank")  # early, as it waits longer than any other
def test_numbers_do_not_depend_on_how_devices_are_spread_over_processes(unbroken, tmp_path):
    assert run(tmp_path, "--processes", "1", "--devices-per-process", "2") == unbroken
    assert unbroken["test_accuracy"] > 0.9
    assert len(unbroken["history"]["train_loss"]) == 8


@pytest.mark.heavy
def test_killed_worker_stops_the_others_and_the_same_command_goes_on(unbroken, start, tmp_path):
    arguments = ["--processes", "2", "--checkpoint-dir", "checkpoints"]
    command = start(tmp_path, *arguments)
    workers = command.workers()
    command.wait_for_a_checkpoint()
    os.kill(workers[1], signal.SIGKILL)
    status, message = command.stops()
    assert status == 1
    pattern = (
        r"multi_process.py: process 1 was killed by SIGKILL. Start the same command again: .* after epoch [1-8] of 8."
    )
    assert re.fullmatch(pattern, message)
    assert all(is_gone(pid) for pid in workers.values())
    assert not (tmp_path / "runs/smoke/results.json").exists()
    assert run(tmp_path, *arguments) == unbroken


@pytest.mark.heavy
def test_damaged_checkpoints_are_passed_over_by_all_processes_and_refused_if_there_is_no_other(
    unbroken_folder, unbroken, start, tmp_path
):
    shutil.copytree(unbroken_folder / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints/8/state/_METADATA").write_text("{")
    assert run(tmp_path, "--processes", "2", "--checkpoint-dir", "checkpoints") == unbroken
    pattern = r"checkpoints/8 is damaged .*: it is now 8.damaged-1, going on from epoch 7$"
    assert len(re.findall(pattern, (tmp_path / "output-0").read_text(), re.MULTILINE)) == 1
    assert (tmp_path / "checkpoints/8.damaged-1/state/_METADATA").read_text() == "{"

    for epoch in ("7", "8"):
        (tmp_path / "checkpoints" / epoch / "history/metadata").unlink()
    status, message = start(tmp_path, "--processes", "2", "--checkpoint-dir", "checkpoints").stops(STARTED_WITHIN)
    assert status == 1
    assert re.search(r"all checkpoints in .*/checkpoints are damaged \(7: history/metadata.*; 8: .*\); put", message)


@pytest.mark.heavy
def test_rank_stops_by_itself_when_another_is_killed(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    arguments = ["--processes", "2", "--checkpoint-dir", "checkpoints", "--coordinator", address]
    ranks = [start(tmp_path, *arguments, "--rank", rank) for rank in ("0", "1")]
    workers = ranks[0].workers() | ranks[1].workers()
    ranks[0].wait_for_a_checkpoint()
    ranks[0].process.kill()  # it holds the coordinator, and its worker must follow it
    status, message = ranks[1].stops()
    assert status == 1
    assert message.startswith("multi_process.py: process 1 lost another process")
    assert re.search(r"Start all processes again: training goes on after epoch [1-8] of 8.$", message)
    ranks[1].process.wait()
    deadline = time.monotonic() + STOPPED_WITHIN
    while not all(is_gone(pid) for pid in workers.values()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.heavy
def test_rank_that_stays_alone_says_so(lonely_rank):
    status, message = lonely_rank.stops(within=STARTED_WITHIN)
    assert status == 1
    assert "process 1 did not find all processes within 1 s. Start all processes again" in message


@pytest.mark.heavy
def test_termination_leaves_nothing_behind(start, tmp_path):
    command = start(tmp_path, "--processes", "2")
    workers = command.workers()
    command.process.terminate()
    status, message = command.stops()
    assert status == 1
    assert message.startswith("multi_process.py: stopped. Start the same command again")
    assert all(is_gone(pid) for pid in workers.values())


def test_checkpoints_of_other_settings_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*SMOKE, "--checkpoint-dir", "checkpoints"]
    multi_process.checkpoints.claim(
        pathlib.Path("checkpoints"), multi_process.shared(multi_process.parse([*arguments, "--seed", "1"]))
    )
    with pytest.raises(SystemExit, match=r"multi_process.py: .* other settings \(seed 1 → 0\); choose another folder"):
        multi_process.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--batch-size", "100", "--processes", "2", "--devices-per-process", "2"],
            "--batch-size 100 must be divisible by 4 devices × 8 micro-batches",
        ),
        (["--processes", "0"], "--processes must be at least 1; got 0"),
        (["--rho", "-1"], "--rho must be finite and at least 0; got -1.0"),
        (["--epochs", "4", "--switch-at", "5"], "--switch-at must be an epoch from 0 to 4; got 5"),
        (["--coordinator", "host", "--rank", "0"], "--coordinator must be HOST:PORT; got host"),
        (["--rank", "0"], "--coordinator and --rank go together"),
        (["--coordinator", "host:1", "--processes", "2", "--rank", "2"], "--rank must be from 0 to 1; got 2"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        multi_process.parse(arguments)
    assert message in capsys.readouterr().err
