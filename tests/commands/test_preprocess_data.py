"""The command, run as users run it: workers, kills, full disks, Ctrl-C."""

import hashlib
import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import names, wait_until

from megapoly.commands import prepare_domains, preprocess
from megapoly.data.builtin import builtin_documents
from megapoly.data.manifest import read_manifest
from megapoly.data.tokenizer import BUILTIN_TOKENIZER

TOOL = Path(__file__).parents[2] / "tools" / "preprocess_data.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """4 MB of lines: two copies of a part of the built-in books, in two files."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [document.text for document in builtin_documents()[:130]]
    lines = [json.dumps({"text": text, "title": text[:20]}) + "\n" for text in texts]
    for name in ("a.jsonl", "b.jsonl"):
        (folder / name).write_text("".join(lines))
        lines.reverse()
    return folder


def command(corpus: Path, prefix: Path, *more: str) -> list[str]:
    args = f"--input {corpus} --output-prefix {prefix} --append-eod --part-mib 0.1".split()
    return [sys.executable, str(TOOL), *args, *more]


def start(args, **options) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(args, **(pipes | options))


def run(args, **options) -> tuple[int, str, str]:
    process = start(args, **options)
    output, errors = process.communicate()
    return process.returncode, output, errors


def hashes(prefix: Path) -> list[str]:
    paths = [Path(f"{prefix}_text_document.{ending}") for ending in ("bin", "idx")]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory) -> list[str]:
    prefix = tmp_path_factory.mktemp("expected") / "out"
    status, output, errors = run(command(corpus, prefix, "--workers", "1"))
    assert status == 0, errors
    assert "260 documents" in output
    return hashes(prefix)


def test_bytes_do_not_depend_on_the_number_of_workers(corpus, tmp_path, expected):
    for workers in ("2", "3"):
        status, output, errors = run(command(corpus, tmp_path / workers, "--workers", workers))
        assert status == 0, errors
        assert hashes(tmp_path / workers) == expected
        manifest = read_manifest(Path(f"{tmp_path / workers}.manifest.json"))
        paths = [corpus / "a.jsonl", corpus / "b.jsonl"]
        assert [source.sha256 for source in manifest.sources] == [
            hashlib.sha256(path.read_bytes()).hexdigest() for path in paths
        ]
        for word in ("a.jsonl", "total", "260", "CPU-seconds"):
            assert word in output


def test_killed_at_twenty_points_it_gives_the_same_bytes(corpus, tmp_path, expected):
    prefix, shards, random_ = tmp_path / "out", tmp_path / "out.shards", random.Random(0)
    args = command(corpus, prefix, "--workers", "2", "--part-mib", "0.02")
    seen, kills = [], 0
    while kills < 20 or len(set(seen)) <= 5:
        process = start(args, start_new_session=True)
        # Until this many more shards are finished, or, if never, the token files are begun.
        wanted = random_.choice([0, 5, 20, 50, 1000]) + len(names(shards, "0*.json"))
        while process.poll() is None and len(names(shards, "0*.json")) < wanted:
            if wanted > 900 and names(shards, "*.partial"):
                break
            time.sleep(0.002)
        time.sleep(random_.uniform(0, 0.02))
        if process.poll() is None:
            # Sometimes the parent alone, as the system does when memory runs out.
            if kills % 3:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
            kills += 1
        process.communicate()
        seen.append(len(names(shards, "0*.json")))
        # A file with a final name is complete.
        if Path(f"{prefix}_text_document.idx").exists():
            assert hashes(prefix) == expected
        if Path(f"{prefix}.manifest.json").exists():
            for path in tmp_path.glob("out[._]*"):
                path.unlink() if path.is_file() else shutil.rmtree(path)
    status, _, errors = run(args)
    assert status == 0, errors
    assert hashes(prefix) == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.manifest.json",
        "out_text_document.bin",
        "out_text_document.idx",
    ]


def test_a_full_disk_is_reported_and_leaves_nothing_incomplete(corpus, tmp_path, expected):
    """A limit on the size of a file is an error of the same kind (EFBIG, not ENOSPC)."""
    prefix = tmp_path / "out"
    for limit in (20_000, 500_000):  # in a shard; while shards are joined
        status, _, errors = run(
            command(corpus, prefix, "--workers", "2"),
            preexec_fn=lambda limit=limit: resource.setrlimit(
                resource.RLIMIT_FSIZE, (limit, limit)
            ),
        )
        assert status == 2, errors
        assert "No space is left to write" in errors and "bytes are free in" in errors
        assert "Traceback" not in errors
        assert [path.name for path in tmp_path.iterdir()] == ["out.shards"]
    assert not list(tmp_path.rglob("*.partial"))
    status, _, errors = run(command(corpus, prefix))
    assert status == 0, errors
    assert hashes(prefix) == expected


@pytest.mark.parametrize("workers", ["1", "2"])
@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_on_request_it_says_so_and_resumes(
    corpus, tmp_path, expected, signal_number, workers
):
    args = command(corpus, tmp_path / "out", "--workers", workers, "--part-mib", "0.02")
    status = 0
    while status == 0:  # it had ended before the signal, on a busy machine
        for path in tmp_path.iterdir():
            path.unlink()
        process = start(args, start_new_session=True)
        wait_until(lambda process=process: names(tmp_path / "out.shards", "0*.json"), process)
        if signal_number == signal.SIGINT:
            os.killpg(process.pid, signal_number)  # Ctrl-C reaches every process of the terminal
        else:
            process.send_signal(signal_number)
        _, errors = process.communicate()
        status = process.returncode
    assert status == 130, errors
    assert "the same command resumes" in errors and "Traceback" not in errors
    status, _, errors = run(args)
    assert status == 0, errors
    assert "resuming: " in errors
    assert hashes(tmp_path / "out")[0] == expected[0]


def test_a_bad_line_stops_all_workers_with_its_place(corpus, tmp_path):
    lines = (corpus / "b.jsonl").read_bytes().splitlines(keepends=True)
    lines[100] = b'{"text": 3}\n'
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes((corpus / "a.jsonl").read_bytes())
    (tmp_path / "in" / "b.jsonl").write_bytes(b"".join(lines))
    status, _, errors = run(command(tmp_path / "in", tmp_path / "out", "--workers", "2"))
    assert status == 2
    assert "b.jsonl, line 101: `text` is not a string (a number)." in errors
    assert "Traceback" not in errors


def test_a_worker_that_dies_is_noticed(corpus, tmp_path):
    process = start(command(corpus, tmp_path / "out", "--workers", "2", "--part-mib", "0.005"))
    wait_until(lambda: names(tmp_path / "out.shards", "0*.json"), process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "A worker died (exit code -9" in errors


def test_two_runs_with_one_prefix_do_not_mix(corpus, tmp_path, expected):
    args = command(corpus, tmp_path / "out", "--workers", "1")
    processes = [start(args), start(args)]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    # The second waits for the first, and then finds its work done or does it again.
    assert sorted(status for _, status in ends)[0] == 0, ends
    assert hashes(tmp_path / "out") == expected


def test_dry_run_estimates_and_writes_nothing(corpus, tmp_path):
    status, output, errors = run(command(corpus, tmp_path / "out", "--dry-run"))
    assert status == 0, errors
    tokens = next(line for line in output.splitlines() if "estimated tokens" in line)
    estimate = int(tokens.split("│")[2].replace(",", ""))
    run(command(corpus, tmp_path / "out"))
    actual = read_manifest(tmp_path / "out.manifest.json").pairs[0].tokens
    assert estimate == pytest.approx(actual, rel=0.1)


def test_flags_of_megatrons_tool(corpus, tmp_path):
    model = TOOL.parents[1] / "megapoly" / "data" / "builtin" / "tokenizer.json"
    args = [sys.executable, str(TOOL)]
    args += f"--input {corpus}/a.jsonl --json-keys text title --tokenizer-model {model}".split()
    args += f"--tokenizer-type HuggingFaceTokenizer --output-prefix {tmp_path}/out".split()
    args += "--append-eod --workers 1 --partitions 4 --log-interval 1000".split()
    status, _, errors = run(args)
    assert status == 0, errors
    assert "--partitions has no effect: " in errors and "--log-interval has no effect" in errors
    for key in ("text", "title"):
        assert (tmp_path / f"out_{key}_document.bin").is_file()
    status, _, errors = run([*args, "--tokenizer-type", "Llama2Tokenizer"])
    assert status == 2 and "read from the tokenizer.json" in errors
    status, _, errors = run([*args, "--split-sentences"])
    assert status == 2 and "--split-sentences is not supported: sentences are for BERT" in errors


def test_a_run_without_a_valid_line_is_no_success(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"content": "one"}\n{"content": "two"}\nbad\n{}\n')
    args = ["--input", str(tmp_path / "a.jsonl"), "--output-prefix", str(tmp_path / "out")]
    args += ["--on-bad-line", "skip", "--workers", "1"]
    for _ in range(2):  # the second finds the token files of the first
        assert preprocess.main(args) == 1
        error = capsys.readouterr().err
        assert "all 4 were rejected: " in error and "--json-keys" in error
        assert error.count(f"{tmp_path}/a.jsonl, ") == 3 and "; .." in error
    with (tmp_path / "a.jsonl").open("a") as stream:
        stream.write('{"text": "three"}\n')
    assert preprocess.main([*args, "--overwrite"]) == 0


def test_invalid_requests_are_refused_with_the_reason(corpus, tmp_path):
    for more, message in (
        (["--part-mib", "1e-7"], "--part-mib (1e-07) must be at least 0.004"),
        (["--max-document-mib", "inf"], "above 0"),
        (["--use-gigatoken", "--tokenizer-backend", "tokenizers"], "exclude each other"),
        (["--json-keys", "a/b"], "a key must not contain `/`"),
        (["--output-prefix", "."], "must end with a name"),
        (["--output-prefix", str(corpus / "a.jsonl" / "x")], "Not a directory"),
    ):
        status, _, errors = run([*command(corpus, tmp_path / "out"), *more], cwd=tmp_path)
        assert status == 2 and message in errors and "Traceback" not in errors, (more, errors)


def test_a_missing_package_is_named(corpus, tmp_path):
    (tmp_path / "orjson.py").write_text("raise ImportError\n")
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    domains = [sys.executable, str(TOOL.with_name("prepare_domains.py")), "--output", str(tmp_path)]
    for args in (command(corpus, tmp_path / "out"), domains):
        status, _, errors = run(args, env=environment)
        assert status == 2
        assert errors == ("The preprocessor needs orjson: pip install 'megapoly[data]'\n")


def test_libraries_start_no_threads_so_that_workers_can_be_forked(corpus, tmp_path):
    """Also where the environment does not limit them; the commands themselves import no library."""
    code = f"""
import sys
from megapoly.commands import prepare_domains, preprocess
print([name for name in ("numpy", "tokenizers", "pyarrow") if name in sys.modules])
preprocess.main({command(corpus, tmp_path / "out", "--workers", "1")[2:]})
from megapoly.data.preprocess.pool import _start_method
print(_start_method())
"""
    limits = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TOKENIZERS_PARALLELISM")
    environment = {name: value for name, value in os.environ.items() if name not in limits}
    status, output, errors = run([sys.executable, "-c", code], env=environment)
    assert status == 0, errors
    lines = output.splitlines()
    assert lines[0] == "[]" and lines[-1] == "fork"


def documented_commands(path: str) -> list[list[str]]:
    """Arguments after `megapoly preprocess` in the lines of a page that run it."""
    text = (TOOL.parents[1] / path).read_text().replace("\\\n", " ")
    return [
        shlex.split(m, comments=True)
        for m in re.findall(r"^ *megapoly preprocess(.*)$", text, re.M)
    ]


def test_documented_commands_run(corpus, tmp_path):
    """In the order of the page, on files of the names that it uses."""
    (tmp_path / "raw" / "more").mkdir(parents=True)
    shutil.copy(corpus / "a.jsonl", tmp_path / "raw" / "a.jsonl")
    shutil.copy(corpus / "b.jsonl", tmp_path / "raw" / "more" / "b.jsonl")
    shutil.copy(BUILTIN_TOKENIZER, tmp_path / "tokenizer.json")
    commands = documented_commands("README.md")
    commands += documented_commands("docs/how-to/preprocess.md")
    assert len(commands) >= 6
    for args in commands:
        if args[0] == "merge":
            for name in ("a", "b"):
                for ending in (".bin", ".idx"):
                    shutil.copy(
                        tmp_path / f"tokens/books_text_document{ending}",
                        tmp_path / f"{name}_text_document{ending}",
                    )
        status, output, errors = run([sys.executable, str(TOOL), *args], cwd=tmp_path)
        assert status == 0, (args, errors)
        assert output
    assert (tmp_path / "ab_text_document.bin").is_file() and (tmp_path / "lengths.png").is_file()


def test_help_names_every_option():
    status, output, _ = run([sys.executable, str(TOOL), "--help"])
    assert status == 0
    for word in ("verify PREFIX", "merge PREFIX", "--on-bad-line", "--dry-run", "--workers"):
        assert word in output


NEAR_MISSES = {
    "verify": ("prefix --vocab-sise 3", "--vocab-sise (the nearest is --vocab-size)"),
    "merge": ("a b --output-prefix c --overwite", "--overwite (the nearest is --overwrite)"),
    "inspect": ("prefix --max_token 3", "--max_token (the nearest is --max-tokens)"),
    "stats": ("prefix --jsno file", "--jsno (the nearest is --json)"),
    "": ("--input a --output-prefix b --apend-eod", "--apend-eod (the nearest is --append-eod)"),
    "domains": ("--output a --vocabsize 300", "--vocabsize (the nearest is --vocab-size)"),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_a_misspelt_flag_names_the_nearest_of_its_command(capsys, name):
    if name in preprocess.SUBCOMMANDS:
        parser = preprocess.subcommand_parser(name)
    else:
        parser = (prepare_domains if name else preprocess).build_parser()
    args, message = NEAR_MISSES[name]
    with pytest.raises(SystemExit) as end:
        parser.parse_args(args.split())
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_a_misspelt_subcommand_names_the_nearest():
    status, _, errors = run([sys.executable, str(TOOL), "verfy", "prefix"])
    assert status == 2 and "`verfy` is not a sub-command; the nearest is `verify`" in errors


@pytest.mark.parametrize("name", preprocess.SUBCOMMANDS)
def test_help_of_a_subcommand_shows_an_example_and_describes_every_option(name):
    parser = preprocess.subcommand_parser(name)
    assert f"\n    megapoly preprocess {name} " in parser.format_help()
    assert all(action.help for action in parser._actions)
