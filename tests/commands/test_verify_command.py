"""The command that verifies checkpoints, for people and cron."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_checkpoints import make_checkpoint

from megapoly.checkpoints.object_store import upload
from megapoly.checkpoints.run_folder import checkpoint_path
from megapoly.commands import verify

FILES = [
    ".metadata",
    "__0_0.distcp",
    "__0_1.distcp",
    "common.pt",
    "config.yaml",
    "metadata.json",
    "run.json",
    "tokenizer/tokenizer.json",
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    first = make_checkpoint(checkpoint_path(tmp_path / "run", 3))
    shutil.copytree(first, checkpoint_path(tmp_path / "run", 6))
    return tmp_path / "run"


def test_whole_checkpoints_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main([str(run)]) == 0
    checkpoints = [checkpoint_path(run, step) for step in (3, 6)]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(path) for path in checkpoints]
    size = sum(path.stat().st_size for path in checkpoints[0].rglob("*") if path.is_file())
    size -= (checkpoints[0] / "run.json").stat().st_size
    assert lines[0].endswith(f": whole, 8 files, {size / 1e6:,.1f} MB")


def test_every_damaged_file_has_a_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = checkpoint_path(run, 6)
    (damaged / "common.pt").write_bytes(b"short")
    (damaged / ".metadata").unlink()
    assert verify.main([str(checkpoint_path(run, 3)), str(damaged), "--files"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:9] == [f"  {name} is whole" for name in FILES]
    assert lines[9:12] == [
        f"{damaged}: damaged",
        "  .metadata is missing",
        "  __0_0.distcp is whole",
    ]
    assert lines[13].startswith("  common.pt has 5 bytes, not ")
    assert verify.main([str(run)]) == 1
    assert capsys.readouterr().out.splitlines()[2:] == ["  .metadata is missing", lines[13]]


def test_what_cannot_be_verified_is_not_whole(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (checkpoint_path(run, 3) / "run.json").write_text("{}")
    (checkpoint_path(run, 6) / "run.json").unlink()
    assert verify.main([str(run)]) == 1
    first, second, why = capsys.readouterr().out.splitlines()
    assert "iter_0000003: not verified, its run.json has no sizes and CRC-32" in first
    assert "iter_0000006: damaged" in second and why == "  run.json is missing"


def test_what_has_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, end in ((tmp_path, "`checkpoints`"), (tmp_path / "no", "the path does not exist")):
        assert verify.main([str(path)]) == 2
        message = capsys.readouterr().err
        assert message.startswith(f"`{path}` has no checkpoint: ") and message.endswith(f"{end}\n")


def test_torch_is_not_imported(run: Path) -> None:
    """So that the command starts in a moment, also where no GPU or engine is."""
    program = (
        "import sys\n"
        "from megapoly.commands import verify\n"
        f"assert verify.main([{str(run)!r}]) == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_checkpoints_in_a_store(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read where they are: the lines are those of the folder."""
    url = f"file://{tmp_path}/store/run"
    for step in (3, 6):
        upload(checkpoint_path(run, step), url)
    assert verify.main([str(run), "--files"]) == 0
    of_folder = capsys.readouterr().out
    assert verify.main([url, "--files"]) == 0
    assert capsys.readouterr().out == of_folder.replace(str(run), url)
    stored = checkpoint_path(tmp_path / "store/run", 6)
    data = bytearray((stored / "__0_0.distcp").read_bytes())
    data[7] ^= 1
    (stored / "__0_0.distcp").write_bytes(data)
    (stored / "__0_1.distcp").write_bytes(data[:7])
    (stored / "common.pt").unlink()
    assert verify.main([f"{url}/checkpoints/iter_0000006"]) == 1
    size = checkpoint_path(run, 6).joinpath("__0_1.distcp").stat().st_size
    assert capsys.readouterr().out.splitlines() == [
        f"{url}/checkpoints/iter_0000006: damaged",
        "  __0_0.distcp is damaged (another CRC-32 than when it was written)",
        f"  __0_1.distcp has 7 bytes, not {size:,}",
        "  common.pt is missing",
    ]
    assert verify.main([f"{url}/absent"]) == 2
    assert "has no complete checkpoint" in capsys.readouterr().err
