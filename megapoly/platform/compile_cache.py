"""The cache of compiled code: torch.compile unpickles and loads what is in it.

By default it is ``torchinductor_USER`` in the folder for temporary files, where every user of a
host may create a folder of that name first.
"""

from __future__ import annotations

import getpass
import os
import re
import stat
import tempfile
from pathlib import Path

from megapoly.errors import UnavailableError

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"


def default_folder() -> Path:
    """Return where torch.compile keeps compiled code unless a variable names another folder.

    Source: torch/_inductor/runtime/cache_dir_utils.py (2.13), ``default_cache_dir``, whose import
    takes a second.
    """
    try:
        user = getpass.getuser()
    except (KeyError, ModuleNotFoundError, OSError):  # an id without a name, in a container
        user = f"uid_{os.getuid()}"
    return Path(tempfile.gettempdir()) / ("torchinductor_" + re.sub(r'[\\/:*?"<>|]', "_", user))


def check_compile_cache() -> None:
    """Create the default cache of ``torch.compile`` for this user, or check whose it is.

    A folder that ``TORCHINDUCTOR_CACHE_DIR`` names is the user's choice, and is not checked.

    Raises:
        UnavailableError: it is not a folder of this user or root, or every user may write in it.
    """
    if VARIABLE in os.environ:
        return
    path = default_folder()
    try:
        path.mkdir(mode=0o700, parents=True)
    except FileExistsError:
        pass
    except OSError:
        return  # read-only: there is nothing to load, and torch says so when it compiles
    status = path.lstat()  # a link is another user's way to choose the folder
    problem = ""
    if not stat.S_ISDIR(status.st_mode):
        problem = "is not a folder"
    elif status.st_uid not in (os.geteuid(), 0):
        problem = f"belongs to the user with id {status.st_uid}"
    elif status.st_mode & stat.S_IWOTH:
        problem = "may be written by every user of this host"
    if problem:
        raise UnavailableError(
            f"torch.compile runs the code that it finds in its cache, and `{path}` {problem}. Set "
            f"{VARIABLE} to a folder of your own."
        )
