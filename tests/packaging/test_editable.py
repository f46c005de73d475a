"""An editable install, where most people meet the package first: from a clone."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

from sources import copy_sources, needs_git

BUILD = "import sys; from setuptools.build_meta import build_editable as b; b(sys.argv[1])"
IMPORT = "import site, sys; site.addsitedir(sys.argv[1]); from megapoly import __version__"


@needs_git
def test_is_found_from_the_folder_of_the_clone(tmp_path: Path) -> None:
    """There a clone named ``megapoly`` is a folder without ``__init__.py``."""
    clone, installed = tmp_path / "megapoly", tmp_path / "site-packages"
    copy_sources(clone)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", BUILD, tmp_path],
        cwd=clone,
        env=environment,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(installed)
    # -S: without the packages of this environment, where megapoly is installed as well.
    command = [sys.executable, "-S", "-c", IMPORT, installed]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
