"""docker/launch.sh: its command line for docker, the request of docker's client, its errors."""

from __future__ import annotations

import contextlib
import dataclasses
import http.server
import itertools
import json
import os
import re
import shlex
import shutil
import socketserver
import subprocess
import threading
import typing
from pathlib import Path

import pytest
from commands import ROOT, Programs
from processes import wait_until

from megapoly.config.schema import Config

LAUNCH = str(ROOT / "docker/launch.sh")
USER = f"{os.getuid()}:{os.getgid()}"
MANY = ["--nnodes", "8", "--node-rank", "3", "--rdzv-endpoint", "gpu01:29500", "--runs", "runs"]
SCRIPT = ["examples/pretrain_moe.sh", "--config", "examples/configs/moe_7b_paper.yaml"]
needs_no_fabric = pytest.mark.skipif(
    Path("/dev/infiniband").exists(), reason="this machine has a fabric, which would be passed on"
)


@pytest.fixture
def docker(programs: Programs) -> Programs:
    """A `docker` that ends with status 3, in a folder with folders for data and results."""
    programs.add("docker", "sys.exit(3)")
    for name in ("runs", "data", "scratch", "fabric"):
        (programs.folder / name).mkdir()
    return programs


def dry(docker: Programs, *args: str, **variables: str) -> list[str]:
    line = ["bash", LAUNCH, "--dry-run", *args]
    status, output = docker.run(line, variables, cwd=docker.folder)
    assert status == 0, output
    assert docker.calls("docker") == []
    return shlex.split(output)


@needs_no_fabric
def test_one_of_many_nodes(docker: Programs) -> None:
    here = docker.folder
    assert dry(docker, *MANY, *SCRIPT, NCCL_IB_HCA="mlx5", NCCL_DEBUG="INFO") == [
        *["docker", "run", "--rm", "--init", "--user", USER, "--workdir", "/opt/megapoly"],
        *["--stop-timeout", "600", "--no-healthcheck", "--gpus", "all", "--ipc", "host"],
        *["--ulimit", "memlock=-1", "--ulimit", "stack=67108864", "--network", "host"],
        *["--volume", f"{here}/runs:/opt/megapoly/runs"],
        *["--volume", f"{here}/data:/opt/megapoly/data:ro"],
        *["--env", "NCCL_DEBUG", "--env", "NCCL_IB_HCA"],
        *["megapoly:gpu", "megapoly-launch", "--nproc-per-node", "gpu"],
        *["--nnodes", "8", "--node-rank", "3"],
        *["--master-addr", "gpu01", "--master-port", "29500", *SCRIPT],
    ]


@needs_no_fabric
def test_one_node_without_gpus(docker: Programs) -> None:
    args = ["--gpus", "none", "--shm-size", "4g", "--name", "a b", "--env", "A=it's; $HOME"]
    mount = f"{docker.folder}/scratch:/scratch:ro"
    script = [SCRIPT[0], "--config=/scratch/a b.yaml"]
    assert dry(docker, *args, "--mount", mount, "--", *script) == [
        *["docker", "run", "--rm", "--init", "--name", "a b", "--user", USER],
        *["--workdir", "/opt/megapoly", "--stop-timeout", "600", "--no-healthcheck"],
        *["--shm-size", "4g", "--ulimit", "memlock=-1", "--ulimit", "stack=67108864"],
        *["--volume", f"{docker.folder}/runs:/opt/megapoly/runs"],
        *["--volume", f"{docker.folder}/data:/opt/megapoly/data:ro", "--volume", mount],
        *["--env", "A=it's; $HOME", "megapoly:cpu", "megapoly-launch"],
        *["--nproc-per-node", "2", "--standalone", *script],
    ]


def test_variables_are_the_options(docker: Programs) -> None:
    here = str(docker.folder)
    args = ["--nproc-per-node", "2", "--gpus", "0,1", "--image", "x:1", "--runs", "fabric"]
    args += [
        "--engine",
        "docker",
        "--data",
        "scratch",
        "--shm-size",
        "1g",
        "--infiniband",
        f"{here}/fabric",
    ]
    as_options = dry(docker, *MANY, *args, *SCRIPT)
    variables = {"NNODES": "8", "NODE_RANK": "3", "RDZV_ENDPOINT": "gpu01:29500"}
    variables |= {"NPROC_PER_NODE": "2", "GPUS": "0,1", "IMAGE": "x:1", "RUNS": "fabric"}
    variables |= {
        "ENGINE": "docker",
        "DATA": "scratch",
        "SHM_SIZE": "1g",
        "INFINIBAND": f"{here}/fabric",
    }
    assert dry(docker, *SCRIPT, **variables) == as_options
    assert ["--gpus", '"device=0,1"'] == as_options[as_options.index("--gpus") :][:2]
    device = as_options.index("--device")
    assert as_options[device + 1 :][:3] == [
        f"{here}/fabric:/dev/infiniband",
        "--cap-add",
        "IPC_LOCK",
    ]
    # An option wins over its variable, written either way.
    assert "y:2" in dry(docker, "--image=y:2", *SCRIPT, **variables)


def test_commands_of_the_documentation(docker: Programs) -> None:
    """Each line of the page about containers, with its absolute folders below this test's."""
    text = (ROOT / "docs/how-to/containers.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^docker/launch.sh (.+)$", text, re.MULTILINE)
    assert len(lines) == 5
    for name in ("scratch/tokens", "shared/runs", "shared/data"):
        (docker.folder / name).mkdir(parents=True)
    for line in lines:
        line = re.sub("/(scratch|shared)/", rf"{docker.folder}/\1/", line)
        args = shlex.split(line, comments=True)
        command = dry(docker, *args)
        script = next(i for i, word in enumerate(args) if word.endswith(".sh"))
        assert (ROOT / args[script]).is_file()
        assert command[-len(args[script:]) :] == args[script:]


def test_help_names_every_option_and_variable(docker: Programs) -> None:
    status, output = docker.run(["bash", LAUNCH, "--help"])
    assert status == 0
    source = Path(LAUNCH).read_text()
    options = set(re.findall(r"^ +(--[a-z-]+)\)", source, re.MULTILINE))
    assert len(options) == 16
    assert options == set(re.findall(r"^(--[a-z-]+)", output, re.MULTILINE))
    variables = set(re.findall(r"=\$\{([A-Z_]+):-", source))
    assert len(variables) == 11
    assert variables == set(re.findall(r"^--\S+ \S+ +([A-Z_]+) ", output, re.MULTILINE))


def test_exported_variables_that_help_names_are_passed_on(docker: Programs) -> None:
    _, text = docker.run(["bash", LAUNCH, "--help"])
    (listed,) = re.findall(r"Exported variables that begin with (.+?)\.", text, re.DOTALL)
    names = [
        name + "X" if name.endswith("_") else name for name in re.findall("[A-Z_]{3,}", listed)
    ]
    assert len(names) == 17
    names += [name.lower() for name in names if name.endswith("_PROXY")]
    internal = ("MEGAPOLY_STATUS_FILE", "MEGAPOLY_SOAK_PIDS")
    other = {"PYTHONPATH": "/x", "AWS_SECRET_ACCESS_KEY": "x", "CUDA_VISIBLE_DEVICES": "0"}
    command = dry(docker, "s", **dict.fromkeys([*names, *internal], "1"), **other)
    assert passed(command) == sorted(names)
    assert command[command.index("--gpus") + 1] == '"device=0"'


def passed(command: list[str]) -> list[str]:
    return [b for a, b in itertools.pairwise(command) if a == "--env"]


def volumes(command: list[str]) -> list[str]:
    return [b for a, b in itertools.pairwise(command) if a == "--volume"]


def test_folders_of_caches_are_mounted_where_they_are(docker: Programs) -> None:
    _, text = docker.run(["bash", LAUNCH, "--help"])
    (listed,) = re.findall(r"mounted where it is: (.+?)\.", text, re.DOTALL)
    names = re.findall("[A-Z_]+", listed)
    assert len(names) == 8
    scratch = f"{docker.folder}/scratch"
    caches = {name: f"{scratch}/{name}" for name in names}
    command = dry(docker, "s", **caches)
    assert passed(command) == sorted(names)
    mounted = [f"{folder}:{folder}" for folder in caches.values()]
    assert sorted(volumes(command)[2:]) == sorted(mounted)
    assert not Path(caches["HF_HOME"]).exists(), "a dry run makes nothing"
    # One that is mounted already is not mounted again.
    command = dry(docker, "--mount", f"{scratch}:{scratch}", "s", **caches)
    assert volumes(command)[2:] == [f"{scratch}:{scratch}"] and passed(command) == sorted(names)
    assert docker.run(["bash", LAUNCH, "s"], caches, cwd=docker.folder)[0] == 3
    assert all(Path(folder).is_dir() for folder in caches.values())


def test_paths_that_the_container_lacks_are_left_out_with_a_line(docker: Programs) -> None:
    files = {"NCCL_TOPO_FILE": "/etc/nccl/topo.xml", "NCCL_DEBUG_FILE": "/dev/stderr"}
    files |= {"UCX_LOG_FILE": "/scratch/../etc/ucx.log", "TORCH_LOGS_OUT": "/scratch/torch.log"}
    line = ["bash", LAUNCH, "--dry-run", "--mount", "scratch:/scratch", "s"]
    status, output = docker.run(line, files, cwd=docker.folder)
    assert status == 0, output
    *notes, command = output.splitlines()
    assert [re.findall("[A-Z_]{5,}", each)[0] for each in notes] == [
        "NCCL_TOPO_FILE",
        "UCX_LOG_FILE",
    ]
    assert "(/etc/nccl/topo.xml)" in notes[0] and "--mount" in notes[0]
    assert passed(shlex.split(command)) == ["NCCL_DEBUG_FILE", "TORCH_LOGS_OUT"]


@pytest.mark.parametrize(
    "visible, gpus, num_processes",
    [
        ("2,3", '"device=2,3"', "2"),
        (
            "GPU-8932f937-d72c-4106-c12f-20bd9faed9f6",
            '"device=GPU-8932f937-d72c-4106-c12f-20bd9faed9f6"',
            "1",
        ),
        ("MIG-1a/2/0,1:0", '"device=MIG-1a/2/0,1:0"', "2"),
        ("1,-1,2", '"device=1"', "1"),  # CUDA reads it up to the first that is none
    ],
)
def test_gpus_are_those_that_cuda_sees(
    docker: Programs, visible: str, gpus: str, num_processes: str
) -> None:
    command = dry(docker, "s", CUDA_VISIBLE_DEVICES=visible)
    assert command[command.index("--gpus") + 1] == gpus
    assert command[command.index("--nproc-per-node") + 1] == num_processes
    # An explicit choice wins.
    command = dry(docker, "--gpus", "7", "s", CUDA_VISIBLE_DEVICES=visible)
    assert command[command.index("--gpus") + 1] == '"device=7"'


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_no_gpu_is_used_where_cuda_sees_none(docker: Programs, visible: str) -> None:
    line = ["bash", LAUNCH, "--dry-run", "s"]
    status, output = docker.run(line, {"CUDA_VISIBLE_DEVICES": visible}, cwd=docker.folder)
    note, command = output.splitlines()
    assert status == 0 and f"CUDA_VISIBLE_DEVICES ({visible})" in note
    assert "--gpus" not in command and "megapoly:cpu" in command


def test_podman_has_gpus_by_the_container_device_interface(docker: Programs) -> None:
    command = dry(docker, "--engine", "podman", "--gpus", "0,GPU-8932f937", *MANY, *SCRIPT)
    devices = [b for a, b in itertools.pairwise(command) if a == "--device"]
    assert devices[:2] == ["nvidia.com/gpu=0", "nvidia.com/gpu=GPU-8932f937"]
    assert command[0] == "podman" and "--gpus" not in command and "--no-healthcheck" in command
    assert ["--security-opt", "label=disable"] == command[command.index("--security-opt") :][:2]
    assert "nvidia.com/gpu=all" in dry(docker, "--engine=podman", "s")


def test_podman_without_the_rights_of_root_keeps_the_caller_and_the_limits(
    docker: Programs,
) -> None:
    docker.add("id", "print(1234)")
    command = dry(docker, "--engine", "podman", "s")
    assert ["--userns", "keep-id"] == command[command.index("--userns") :][:2]
    assert "1234:1234" in command
    limits = [b for a, b in itertools.pairwise(command) if a == "--ulimit"]
    raised = subprocess.run(["bash", "-c", "ulimit -l unlimited"], capture_output=True)
    assert limits == (["host"] if raised.returncode else ["memlock=-1", "stack=67108864"])


@pytest.mark.parametrize("knows", [True, False])
def test_nerdctl_has_an_option_only_if_it_knows_it(docker: Programs, knows: bool) -> None:
    docker.add("nerdctl", f"print('--no-healthcheck' if {knows} else '')")
    command = dry(docker, "--engine", "nerdctl", "--gpus", "0,1", "s")
    assert command[0] == "nerdctl" and ("--no-healthcheck" in command) == knows
    assert command[command.index("--gpus") + 1] == '"device=0,1"' and "--userns" not in command


def test_the_engine_is_the_first_on_the_path(tmp_path: Path, programs: Programs) -> None:
    """In a PATH of its own, since this machine may have engines."""
    for name in ("bash", "id", "env", "grep", "sort", "head", "mkdir", "python3"):
        (programs.path / name).symlink_to(shutil.which(name))

    def chosen(*args: str) -> str:
        line = ["bash", LAUNCH, "--dry-run", *args, "s"]
        variables = {"PATH": str(programs.path)}
        done = subprocess.run(
            line, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert chosen().startswith("docker run "), "what a dry run shows without an engine"
    programs.add("nerdctl")
    assert chosen().startswith("nerdctl run ")
    programs.add("podman")
    assert chosen().startswith("podman run ")
    programs.add("docker")
    assert chosen().startswith("docker run ") and "--gpus all" in chosen()
    assert chosen("--engine", "nerdctl").startswith("nerdctl run ")
    # podman under docker's name, as a script and as a link: it would ignore --gpus.
    (programs.path / "docker").write_text('#!/bin/sh\nexec /usr/bin/podman "$@"\n')
    assert chosen().startswith("docker run ") and "nvidia.com/gpu=all" in chosen()
    for name in ("docker", "podman"):
        (programs.path / name).unlink()
    (programs.path / "podman").write_text("#!/bin/sh\n")
    (programs.path / "podman").chmod(0o755)
    (programs.path / "docker").symlink_to("podman")
    assert "nvidia.com/gpu=all" in chosen()


def paths_of_script(name: str) -> set[str]:
    (listed,) = re.findall(rf"^{name}='(.+?)'", Path(LAUNCH).read_text(), re.MULTILINE)
    return set(listed.split("|"))


def test_every_option_of_the_configuration_that_names_files_is_checked() -> None:
    """Every option with free text is a path, or is named here as something else."""
    no_path = {"model.activation", "training.eval_tasks", "training.skip_batches"}
    no_path |= {"checkpoint.upload"}  # a URL
    hints = typing.get_type_hints(Config)
    fields = {"run_dir": hints["run_dir"]}
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(hints[section.name]):
            inner = typing.get_type_hints(hints[section.name])
            fields |= {f"{section.name}.{name}": hint for name, hint in inner.items()}
    text = {
        name for name, hint in fields.items() if "str" in re.sub(r"Literal\[.*?\]", "", str(hint))
    }
    assert no_path < text
    checked = paths_of_script("read_one") | paths_of_script("read_several")
    checked |= paths_of_script("written") | paths_of_script("written_several")
    assert checked == {"--config"} | {f"--{name}" for name in text - no_path}


def test_sigterm_is_dockers(docker: Programs) -> None:
    """As a service or a scheduler sends it, to one process; docker's client forwards it."""
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    wait += "(folder / 'ready').touch()\nsignal.pause()\n"
    docker.add("docker", wait)
    process = docker.start(["bash", LAUNCH, *SCRIPT], cwd=docker.folder)
    wait_until((docker.folder / "ready").exists, process)
    process.terminate()
    process.communicate()
    assert process.returncode == 75


REFUSALS = {
    "no endpoint": (["--nnodes", "2", "s"], ["--rdzv-endpoint", "not set", "(2)", "29500"]),
    "no port": (["--nnodes", "2", "--rdzv-endpoint", "gpu01", "s"], ["(gpu01)", "HOST:PORT"]),
    "rank": ([*MANY[:2], "--node-rank", "8", "s"], ["--node-rank", "(8)", "0 to 7"]),
    "rank of one": (["--node-rank", "1", "s"], ["(1)", "--nnodes", "0 to 0"]),
    "lone endpoint": (["--rdzv-endpoint", "a:1", "s"], ["(a:1)", "--nnodes"]),
    "nodes": (["--nnodes", "0", "s"], ["--nnodes", "(0)", "1 or more"]),
    "gpus": (["--gpus", "two", "s"], ["--gpus", "(two)", "all, none", "0,1"]),
    "processes": (["--nproc-per-node", "eight", "s"], ["(eight)", "number of processes"]),
    "too many": (["--gpus", "0,1", "--nproc-per-node", "4", "s"], ["(4)", "--gpus", "(2)"]),
    "unshared runs": (MANY[:-2] + ["s"], ["--runs", "not set", "share", "(8)"]),
    "engine": (["--engine", "lxc", "s"], ["--engine", "(lxc)", "docker, podman or nerdctl"]),
    "gpu processes": (["--gpus", "none", "--nproc-per-node", "gpu", "s"], ["(gpu)", "(none)"]),
    "port": (["--nnodes", "2", "--rdzv-endpoint", "a:65536", "s"], ["(a:65536)", "65535"]),
    "bare IPv6": (["--nnodes", "2", "--rdzv-endpoint", "fd00::1:29500", "s"], ["[fd00::1]"]),
    "part of a list": (["--gpus", "0,", "s"], ["(0,)", "commas"]),
    "unknown": (["--gpu", "all", "s"], ["`--gpu`", "--help"]),
    "no value": (["--image"], ["`--image`", "value"]),
    "option for value": (["--name", "--dry-run", "s"], ["`--name`", "value"]),
    "no script": (["--nnodes", "1"], ["script", "examples/pretrain_moe.sh"]),
    "mount": (["--mount", "scratch", "s"], ["(scratch)", "SRC:DST"]),
    "no folder": (["--mount", "absent:/x", "s"], ["--mount", "(absent)", "folder"]),
    "no data": (["--data", "absent", "s"], ["--data", "(absent)", "folder"]),
    "colon": (["--runs", "a:b", "s"], ["--runs", "a:b)", "colon"]),
    "run_dir": (
        ["s", "--run_dir", "/shared/runs/moe"],
        ["(/shared/runs/moe)", "outlives", "--mount"],
    ),
    "run_dir of the image": (["s", "--run_dir=out/moe"], ["(out/moe)", "outlives"]),
    "run_dir read-only": (["--mount", ".:/x:ro", "s", "--run_dir", "/x/a"], ["(/x/a)"]),
    "run_dir by way of runs": (["s", "--run_dir", "runs/../../x"], ["(runs/../../x)", "outlives"]),
    "run_dir without value": (["s", "--run_dir"], ["`--run_dir`", "needs a value"]),
    "run_dir before an option": (
        ["s", "--run_dir", "--config=x"],
        ["`--run_dir`", "needs a value"],
    ),
    "empty run_dir": (["s", "--run_dir="], ["`--run_dir`", "needs a value"]),
    "cache": (["s", "--data.cache_dir", "/scratch/c"], ["--data.cache_dir", "outlives"]),
    "export": (
        ["s", "--logging.export", "[otlp:http://host:4318, prometheus:/var/lib/m.prom]"],
        ["(/var/lib/m.prom)", "outlives", "--mount"],
    ),
    "cache of the image": (["s", "--data.cache_dir=cache"], ["--data.cache_dir", "(cache)"]),
    "tokenizer": (["s", "--data.tokenizer", "../t.json"], ["(../t.json)", "--mount"]),
    "tasks": (["s", "--training.eval_tasks_data=/q"], ["(/q)", "--mount /:/"]),
    "checkpoint": (["s", "--checkpoint.load", "/old/run"], ["(/old/run)", "--mount /old:/old"]),
    "blend": (["s", "--data.blend", "/tokens/a"], ["(/tokens/a)", "--mount /tokens:/tokens"]),
    "second of a blend": (
        ["s", "--data.blend", "[data/a, {path: '/tokens/b', weight: 2}]"],
        ["(/tokens/b)", "--mount /tokens:/tokens"],
    ),
    "validation": (["s", "--data.validation", '{"wiki":["data/w","/v/x"]}'], ["(/v/x)"]),
    "mount beside": (
        ["--mount", "scratch:/tok", "s", "--data.tokenizer", "/tokens/t.json"],
        ["(/tokens/t.json)"],
    ),
    "cache variable": (["s"], ["`HF_HOME`", "(cache/hf)", "from the root"]),
    "variable": (["--env", "A B", "s"], ["--env", "(A B)", "NAME"]),
    "config": (
        ["s", "--config", "/etc/my/c.yaml"],
        ["(/etc/my/c.yaml)", "--mount /etc/my:/etc/my"],
    ),
}


@pytest.mark.parametrize("args, expected", REFUSALS.values(), ids=REFUSALS)
def test_refuses(docker: Programs, args: list[str], expected: list[str]) -> None:
    variables = {"HF_HOME": "cache/hf"} if "`HF_HOME`" in expected else {}
    status, output = docker.run(["bash", LAUNCH, *args], variables, cwd=docker.folder)
    assert status == 2
    assert len(output.splitlines()) == 1 and output.startswith("docker/launch.sh: ")
    assert [word for word in expected if word not in output] == []
    assert docker.calls("docker") == []


def test_status_is_passed_on_and_results_get_a_folder(docker: Programs) -> None:
    shutil.rmtree(docker.folder / "runs")
    args = ["bash", LAUNCH, "--runs", "deep/runs", *SCRIPT]
    status, output = docker.run(args, cwd=docker.folder)
    assert status == 3, output
    (call,) = docker.calls("docker")
    assert f"{docker.folder}/deep/runs:/opt/megapoly/runs" in call
    assert (docker.folder / "deep/runs").is_dir()


def test_folders_are_those_of_this_folder(docker: Programs) -> None:
    """Whatever the user's shell has for `cd`; and a run may be where another folder is mounted."""
    elsewhere = docker.folder / "elsewhere"
    (elsewhere / "data").mkdir(parents=True)
    args = ["--data", "data", "--mount", "scratch:/scratch", "s", "--run_dir", "/scratch"]
    command = dry(docker, *args, CDPATH=str(elsewhere))
    assert f"{docker.folder}/data:/opt/megapoly/data:ro" in command
    assert f"{docker.folder}/scratch:/scratch" in command
    paths = [
        "--data.tokenizer",
        "/scratch/../scratch/t.json",
        "--checkpoint.load",
        "s3://bucket/run",
    ]
    paths += [
        "--data.blend",
        "[data/a, /scratch/b, 's3://bucket/c', gs://d/e]",
        "--run_dir=runs/./a",
    ]
    paths += ["--logging.export", "[prometheus:/scratch/m.prom, 'otlp:http://host:4318/v1']"]
    paths += ["--data.cache_dir", "null", "--training.eval_tasks_data", "/opt/megapoly/tests"]
    assert dry(docker, "--mount", "scratch:/scratch/", "s", *paths)[-len(paths) :] == paths
    # The checkout in place of the image's.
    args = ["--mount", ".:/opt/megapoly", "s", "--run_dir=out/a"]
    assert dry(docker, *args)[-1] == "--run_dir=out/a"


@pytest.mark.parametrize(
    "gpus, num_processes",
    [("GPU-8932f937-d72c-4106-c12f-20bd9faed9f6", "1"), ("MIG-1a/2/0,1:0,3", "3")],
)
def test_gpus_by_uuid_and_their_parts(docker: Programs, gpus: str, num_processes: str) -> None:
    command = dry(docker, "--gpus", gpus, "s")
    assert f'"device={gpus}"' in command
    assert command[command.index("--nproc-per-node") + 1] == num_processes


def test_node_0_by_its_ipv6_address(docker: Programs) -> None:
    command = dry(docker, *MANY, "--rdzv-endpoint", "[fd00::1]:29500", "s")
    assert command[command.index("--master-addr") :][:4] == [
        *["--master-addr", "fd00::1", "--master-port", "29500"]
    ]


def test_refusals_name_the_variables_that_count(docker: Programs) -> None:
    line = ["bash", LAUNCH, "--gpus", "none", "s"]
    status, output = docker.run(line, {"DATA": "x.csv", "NODE_RANK": "0"}, cwd=docker.folder)
    assert status == 2 and output.endswith("(exported and read: NODE_RANK, DATA)\n"), output


def test_without_docker_nothing_is_made(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("bash", "id", "env", "grep", "sort", "head"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    done = subprocess.run(
        ["bash", LAUNCH, "s"],
        cwd=tmp_path,
        env={"PATH": str(tmp_path / "bin")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 127
    assert "docker, podman or nerdctl must be on the PATH" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("path", ["docker/launch.sh", "examples/slurm/pretrain.sbatch"])
def test_bash_of_macos_reads_every_pattern(path: str) -> None:
    """Bash 3.2 takes no parenthesis behind =~ but in a variable."""
    patterns = re.findall(r"=~ (\S+)", (ROOT / path).read_text())
    assert patterns and [pattern for pattern in patterns if "(" in pattern] == []


class Engine(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Docker's engine as far as its client calls it before a container starts; then it declines."""

    daemon_threads = True
    created: dict

    class RequestHandlerClass(http.server.BaseHTTPRequestHandler):  # noqa: D106
        def answer(self, status: int, content: dict) -> None:
            body = json.dumps(content).encode()
            with contextlib.suppress(BrokenPipeError):  # the client need not wait for it
                self.send_response(status)
                self.send_header("API-Version", "1.41")
                self.send_header("OSType", "linux")
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

        def do_GET(self) -> None:
            self.answer(200, {"OSType": "linux"})

        do_HEAD = do_GET

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if "/containers/create" in self.path:
                self.server.created = json.loads(body)
                self.answer(201, {"Id": "c0ffee", "Warnings": []})
            else:
                self.answer(500, {"message": "no container is started here"})

        def log_message(self, *args: object) -> None:
            pass


def test_docker_reads_the_line_as_it_is_meant(tmp_path: Path, programs: Programs) -> None:
    """The request that docker's own client sends to its engine."""
    if not shutil.which("docker"):
        pytest.skip("this machine has no command `docker`")
    (tmp_path / "fabric").mkdir()
    socket = tmp_path / "engine.sock"
    with Engine(str(socket), Engine.RequestHandlerClass) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        args = [*MANY, "--gpus", "0,1", "--infiniband", "fabric", "--mount", ".:/scratch:ro"]
        variables = {"DOCKER_HOST": f"unix://{socket}", "NCCL_IB_HCA": "mlx5"}
        line = ["bash", LAUNCH, *args, "--env", "A=b c", *SCRIPT]
        status, output = programs.run(line, variables, cwd=tmp_path)
        engine.shutdown()
    assert status and "received 500" in output, output
    asked, host = engine.created, engine.created["HostConfig"]
    assert asked["Image"] == "megapoly:gpu" and asked["User"] == USER
    assert asked["Cmd"][:3] == ["megapoly-launch", "--nproc-per-node", "2"]
    assert asked["Cmd"][-3:] == SCRIPT and not asked.get("Entrypoint")
    assert asked["StopTimeout"] == 600 and asked["Healthcheck"]["Test"] == ["NONE"]
    assert {"NCCL_IB_HCA=mlx5", "A=b c"} <= set(asked["Env"])
    (gpus,) = host["DeviceRequests"]
    assert gpus["DeviceIDs"] == ["0", "1"] and gpus["Capabilities"] == [["gpu"]]
    assert host["NetworkMode"] == host["IpcMode"] == "host"
    assert host["Init"] and host["AutoRemove"] and host["CapAdd"][0].endswith("IPC_LOCK")
    limits = {limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in host["Ulimits"]}
    assert limits == {"memlock": (-1, -1), "stack": (67108864, 67108864)}
    mounts = {f"{tmp_path}/runs:/opt/megapoly/runs", f"{tmp_path}:/scratch:ro"}
    assert set(host["Binds"]) == mounts and len(host["Binds"]) == 2
    (device,) = host["Devices"]
    assert device["PathOnHost"] == f"{tmp_path}/fabric"
    assert device["PathInContainer"] == "/dev/infiniband"
