"""examples/slurm/pretrain.sbatch: its options for Slurm, and what each end of a job leads to."""

from __future__ import annotations

import re
import shlex
import signal
import time
from pathlib import Path

import pytest
from commands import ROOT, TINY, Programs, steps
from processes import num_lines, wait_until

from megapoly.config import load_recipe
from megapoly.config.rules import find_problems
from megapoly.platform.machine import Machine
from megapoly.testing.jobs import shared_cache

SBATCH = ROOT / "examples/slurm/pretrain.sbatch"
NODE = ROOT / "examples/slurm/node.sh"
MOE = ["examples/pretrain_moe.sh", "--config", "examples/configs/moe_7b_paper.yaml"]
JOB = {
    "ENVIRONMENT": "BATCH",
    "SLURM_SUBMIT_DIR": str(ROOT),
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_END_TIME": str(int(time.time()) + 24 * 3600),
    "SLURM_JOB_CPUS_PER_NODE": "128,96(x1)",
}
# Stand-ins for Slurm's programs, for what the Slurm of tests/cluster cannot show or takes long for.
# `srun` answers for both nodes where they are looked at; then it ends, waits, or starts a task for
# each node on this machine, with the same arguments, and its status is the highest.
SRUN_LOOKS = """
if args == ['--help']:
    print('--container-image=... [pyxis]')
    sys.exit()
if 'look' in args:
    for node, name in enumerate(os.environ.get('NODES', 'gpu07 gpu08').split()):
        print('look', node, name, 8, args[-1] if node == 0 else '-')
    sys.exit()
"""
SRUN_ENDS = SRUN_LOOKS + "sys.exit(int(os.environ['SRUN_STATUS']))\n"
SRUN_WAITS = (
    SRUN_LOOKS
    + """
while not (folder / 'scancel.jsonl').exists():
    time.sleep(0.02)
sys.exit(75)
"""
)
SRUN_RUNS = (
    SRUN_LOOKS
    + """
count = int(args[args.index('--ntasks') + 1])
task = args[args.index('bash'):]
tasks = [
    subprocess.Popen(task, env=os.environ | {'SLURM_NODEID': str(node)}, start_new_session=True)
    for node in range(count)
]
(folder / 'pids').write_text(' '.join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
)
SCANCEL_SIGNALS = """
for pid in (folder / 'pids').read_text().split():
    os.killpg(int(pid), signal.SIGTERM)
"""


@pytest.fixture
def slurm(programs: Programs) -> Programs:
    programs.add("scontrol")
    programs.add("scancel")
    programs.add("srun", SRUN_ENDS)
    return programs


def requeued(slurm: Programs) -> bool:
    return ["requeue", "4711"] in slurm.calls("scontrol")


def started(slurm: Programs) -> list[list[str]]:
    """Return the calls of srun that start launchers."""
    return [call for call in slurm.calls("srun") if "launch" in call]


def test_a_launcher_on_each_node(slurm: Programs) -> None:
    more = ["--run_dir", "/shared/a b"]
    variables = JOB | {"SRUN_STATUS": "0"}
    status, output = slurm.run(["bash", str(SBATCH), *MOE, *more], variables)
    assert status == 0, output
    assert slurm.calls("scontrol") == []  # with the variable, nothing else is asked
    step = ["--nodes", "2", "--ntasks", "2", "--ntasks-per-node", "1"]
    step += ["--cpus-per-task", "96", "--cpu-bind", "none"]  # the fewest of a node
    looks, call = slurm.calls("srun")
    node = ["bash", "examples/slurm/node.sh"]
    assert looks == [*step, "--quiet", *node, "look", "24711"]
    assert call == [
        *[*step, "--wait", "600", *node, "launch"],
        *["--nnodes", "2", "--nproc-per-node", "8"],
        *["--master-addr", "gpu07", "--master-port", "24711", *MOE, *more],
    ]


def test_in_a_container(slurm: Programs) -> None:
    names = ["PYTHONPATH", "PYTHONHOME", "PYTHONNOUSERSITE", "MEGAPOLY_STOPPED_STATUS"]
    slurm.add("srun", SRUN_LOOKS + f"print([os.environ.get(name) for name in {names}])\n")
    variables = JOB | {"CONTAINER": "megapoly.sqsh", "PYTHONPATH": "/opt/modules/python"}
    variables |= {"MOUNTS": "/shared:/shared", "NPROC_PER_NODE": "4", "MASTER_PORT": "1234"}
    status, output = slurm.run(["bash", str(SBATCH), *MOE], variables)
    assert status == 0 and output.endswith("[None, None, '1', '75']\n"), output
    (call,) = started(slurm)
    container = call[call.index("--wait") + 2 : call.index("bash")]
    assert container == [
        *["--container-image", "megapoly.sqsh"],
        *["--container-mounts", f"{ROOT}:/opt/megapoly,/shared:/shared"],
        *["--container-workdir", "/opt/megapoly", "--no-container-mount-home"],
        "--container-writable",
    ]
    assert call[call.index("--nproc-per-node") + 1] == "4"
    assert call[call.index("--master-port") + 1] == "1234"


@pytest.mark.parametrize(
    "status, expected", [(0, 0), (1, 1), (127, 127), (201, 1), (202, 2), (203, 3)]
)
def test_complete_and_failed_jobs_stay_so(slurm: Programs, status: int, expected: int) -> None:
    variables = JOB | {"SRUN_STATUS": str(status)}
    assert slurm.run(["bash", str(SBATCH), *MOE], variables)[0] == expected
    assert not requeued(slurm)


@pytest.mark.parametrize("status", [4, 5, 137, 139, 253])
def test_lost_jobs_are_requeued(slurm: Programs, status: int) -> None:
    """Slurm's status of a step that was killed for its memory is 253."""
    variables = JOB | {"SRUN_STATUS": str(status)}
    assert slurm.run(["bash", str(SBATCH), *MOE], variables)[0] == 0
    assert requeued(slurm)


def test_preempted_job_is_requeued_but_not_for_ever(slurm: Programs) -> None:
    """Slurm signals only the launchers: only their status says that the run is not complete."""
    variables = JOB | {"SRUN_STATUS": "75", "MAX_REQUEUES": "3"}
    status, output = slurm.run(
        ["bash", str(SBATCH), *MOE], variables | {"SLURM_RESTART_COUNT": "3"}
    )
    assert status == 75 and "`MAX_REQUEUES` (3)" in output and not requeued(slurm)
    status, output = slurm.run(
        ["bash", str(SBATCH), *MOE], variables | {"SLURM_RESTART_COUNT": "2"}
    )
    assert status == 0 and "start 3," in output and requeued(slurm)


def test_task_of_an_array_is_requeued_alone(slurm: Programs) -> None:
    """The first task has the array's number, which means all tasks to Slurm."""
    slurm.add("srun", SRUN_WAITS)
    variables = JOB | {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "1"}
    process = slurm.start(["bash", str(SBATCH), *MOE], variables)
    wait_until(lambda: bool(started(slurm)), process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert slurm.calls("scancel") == [["--signal", "TERM", "4711_1"]]
    assert slurm.calls("scontrol")[-1] == ["requeue", "4711_1"]


def test_less_time_than_the_signal_has_is_no_loop(slurm: Programs) -> None:
    """Slurm signals such a job at once, whenever it starts."""
    slurm.add("srun", SRUN_WAITS)
    variables = JOB | {"SLURM_JOB_END_TIME": str(int(time.time()) + 590)}
    process = slurm.start(["bash", str(SBATCH), *MOE], variables)
    wait_until(lambda: bool(started(slurm)), process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == 75 and "`--time`" in output and not requeued(slurm)


@pytest.mark.parametrize("known", [True, False], ids=["batch", "plain"])
def test_cancelled_job_is_not_requeued(slurm: Programs, known: bool) -> None:
    """Slurm signals only the shell, or signals all processes and forgets the job."""
    slurm.add("srun", SRUN_WAITS)
    slurm.add("scancel", "" if known else "sys.exit('Invalid job id specified')")
    process = slurm.start(["bash", str(SBATCH), *MOE], JOB)
    wait_until(lambda: bool(started(slurm)), process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate()
    assert process.returncode == 0 and "cancelled" in output and "Invalid" not in output
    assert not requeued(slurm)
    assert slurm.calls("scancel") == [["--signal", "TERM", "4711"]]


@pytest.mark.parametrize(
    "args, variables, expected",
    [
        ([], {}, ["(not named)", "examples/pretrain_moe.sh"]),
        (["pretrain.sh"], {}, ["(pretrain.sh)", "checkout"]),
        (["README.md"], {"SLURM_SUBMIT_DIR": str(ROOT / "tests")}, ["README.md", "tests"]),
        (MOE, {"NPROC_PER_NODE": "all"}, ["NPROC_PER_NODE", "(all"]),
        (MOE, {"MAX_REQUEUES": "-1"}, ["MAX_REQUEUES", "(-1)"]),
        (MOE, {"MASTER_PORT": "http"}, ["`MASTER_PORT` (http)", "1 to 65535"]),
        (MOE, {"MASTER_PORT": "65536"}, ["`MASTER_PORT` (65536)"]),
        (MOE, {"MASTER_PORT": "0"}, ["`MASTER_PORT` (0)"]),
        (MOE, {"CONTAINER_RUNTIME": "docker"}, ["`CONTAINER_RUNTIME` (docker)", "pyxis or"]),
        (MOE, {"SLURM_JOB_CPUS_PER_NODE": ""}, ["`SLURM_JOB_CPUS_PER_NODE` must be set"]),
        (MOE, {"SLURM_JOB_NUM_NODES": ""}, ["`SLURM_JOB_NUM_NODES` must be set"]),
        (MOE, {"SLURM_JOB_ID": ""}, ["a job for sbatch"]),
        (MOE, {"SLURM_STEP_ID": "0"}, ["srun starts this once for each task"]),
        (MOE, {"ENVIRONMENT": ""}, ["salloc"]),
    ],
)
def test_slurm_script_refuses(
    slurm: Programs, args: list[str], variables: dict[str, str], expected: list[str]
) -> None:
    status, output = slurm.run(["bash", str(SBATCH), *args], JOB | variables)
    assert status == 2 and len(output.splitlines()) == 1, output
    assert [word for word in expected if word not in output] == []
    assert slurm.calls("srun") == []


def test_no_launcher_starts_where_a_node_does_not_answer(slurm: Programs) -> None:
    variables = JOB | {"SRUN_STATUS": "0", "NODES": "gpu07"}
    status, output = slurm.run(["bash", str(SBATCH), *MOE], variables)
    assert status == 2 and "not all of the 2 nodes answered" in output and started(slurm) == []


def test_in_apptainers_container(tmp_path: Path, slurm: Programs) -> None:
    """Apptainer could not be had: what node.sh calls, with the options of its documentation."""
    slurm.add("srun", SRUN_RUNS)
    slurm.add("apptainer", "print(os.environ.get('PYTHONPATH'))\n")
    variables = JOB | {"CONTAINER": "docker://megapoly:gpu", "MOUNTS": "/shared:/shared:ro"}
    variables |= {"SLURM_JOB_NUM_NODES": "1", "NODES": "gpu07", "PYTHONPATH": "/opt/modules"}
    status, output = slurm.run(["bash", str(SBATCH), *MOE], variables)
    assert status == 0 and "None\n" in output, output
    (call,) = started(slurm)
    assert "--container-image" not in call
    (call,) = slurm.calls("apptainer")
    names = "MEGAPOLY_STOPPED_STATUS=75,PYTHONNOUSERSITE=1,PYTHONUNBUFFERED=1,SLURM_JOB_ID=4711"
    assert call[:10] == [
        *["exec", "--nv", "--writable-tmpfs", "--env", names, "--pwd", "/opt/megapoly"],
        *["--bind", f"{ROOT}:/opt/megapoly,/shared:/shared:ro", "docker://megapoly:gpu"],
    ]
    assert call[10:15] == ["megapoly-launch", "--node-rank", "0", "--nnodes", "1"]


@pytest.mark.parametrize(
    "image, runtime, expected",
    [
        ("megapoly.sif", None, "apptainer"),
        ("docker://megapoly:gpu", None, "apptainer"),
        ("megapoly.sqsh", None, "pyxis"),
        ("nvcr.io#nvidia/pytorch:26.01-py3", None, "pyxis"),
        ("docker://megapoly:gpu", "pyxis", "pyxis"),
        ("sandbox", "apptainer", "apptainer"),
    ],
)
def test_the_image_says_its_runtime(
    slurm: Programs, image: str, runtime: str | None, expected: str
) -> None:
    slurm.add("apptainer")
    variables = JOB | {"CONTAINER": image, "SRUN_STATUS": "0"}
    variables |= {} if runtime is None else {"CONTAINER_RUNTIME": runtime}
    assert slurm.run(["bash", str(SBATCH), *MOE], variables)[0] == 0
    (call,) = started(slurm)
    assert ("--container-image" in call) == (expected == "pyxis")


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "0,1"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "0,1,5"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-1a2b"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({}, 2),  # those of nvidia-smi
    ],
)
def test_gpus_of_a_node(programs: Programs, variables: dict[str, str], expected: int) -> None:
    gpu = "GPU {}: NVIDIA H100 (UUID: GPU-{})"
    programs.add("nvidia-smi", f"print({gpu.format(0, 1)!r}, {gpu.format(1, 2)!r}, sep='\\n')\n")
    look = ["bash", str(NODE), "look", "24711"]
    of_node = {"SLURM_NODEID": "1", "SLURMD_NODENAME": "gpu08"}
    status, output = programs.run(look, of_node | variables)
    assert status == 0 and output == f"look 1 gpu08 {expected} -\n"


def test_the_papers_jobs_fit_their_nodes() -> None:
    """Check the commands at the head of the file against the GPUs that it requests for a node."""
    text = SBATCH.read_text()
    head = text[: text.index("#SBATCH")].replace("# ", "").replace("\\\n", " ")
    (gpus,) = re.findall(r"^#SBATCH --gres=gpu:(\d+)$", text, re.MULTILINE)
    jobs = {}
    for line in re.findall(r"^ +sbatch (.+)$", head, re.MULTILINE):
        args = shlex.split(line)
        assert args[2] == "examples/slurm/pretrain.sbatch" and (ROOT / args[3]).is_file()
        jobs[args[args.index("--config") + 1]] = int(args[1]) * int(gpus)
    assert jobs == {
        "dense_1b_paper": 32,
        "moe_7b_paper": 64,
    }
    a100 = Machine(cuda=True, compute_capability=(8, 0), transformer_engine=True)
    for config, world_size in jobs.items():
        problems = find_problems(load_recipe(config), world_size=world_size, machine=a100)
        assert [problem for problem in problems if "`data." not in problem] == []


def test_options_reach_sbatch_before_the_first_command() -> None:
    lines = SBATCH.read_text().splitlines()
    options = [line for line in lines if line.startswith("#SBATCH")]
    first_command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(lines.index(option) < first_command for option in options)
    assert {"#SBATCH --requeue", "#SBATCH --signal=B:USR1@600"} <= set(options)
    assert "#SBATCH --ntasks-per-node=1" in options


def test_saves_and_resumes_in_a_container(tmp_path: Path, slurm: Programs) -> None:
    """Two nodes, USR1, the queue; docker/launch.sh, with a stand-in for docker, ends the run."""
    slurm.add("scancel", SCANCEL_SIGNALS)
    slurm.add("srun", SRUN_RUNS)
    run_dir = tmp_path / "runs" / "one"
    options = [*TINY, "--run_dir", str(run_dir), "--data.cache_dir", shared_cache().name]
    script = ["examples/pretrain_dense.sh", *options]
    variables = JOB | {"NPROC_PER_NODE": "1", "OMP_NUM_THREADS": "1", "NODES": "localhost other"}
    args = ["bash", str(SBATCH), *script, "--training.train_iters", "400"]
    process = slurm.start(args, variables)
    wait_until(lambda: num_lines(run_dir / "metrics.jsonl") >= 2, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert slurm.calls("scancel") == [["--signal", "TERM", "4711"]]
    assert requeued(slurm), output
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    stopped_at = steps(run_dir)[-1]
    assert checkpoint.name == f"iter_{stopped_at:07d}" and stopped_at < 400
    assert "2 processes" not in output and "2 x CPU" in output

    slurm.add("docker", "command = args[args.index('megapoly:cpu') + 1:]\n" + EXEC)
    launch = ["bash", str(ROOT / "docker/launch.sh"), "--gpus", "none", "--nproc-per-node", "1"]
    cache = shared_cache().name
    launch += ["--runs", str(tmp_path), "--mount", f"{tmp_path}/runs:{tmp_path}/runs"]
    launch += ["--mount", f"{cache}:{cache}", *script]
    last = str(stopped_at + 1)
    variables = {"OMP_NUM_THREADS": "1", "MEGAPOLY_STOPPED_STATUS": "75"}
    status, output = slurm.run([*launch, "--training.train_iters", last], variables)
    assert status == 0, output
    assert f"at step {stopped_at}" in output and steps(run_dir)[-1] == stopped_at + 1


# Not isolated as a real container is.
EXEC = "os.execvp(command[0], command)\n"
