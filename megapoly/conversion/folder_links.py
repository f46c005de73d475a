"""Symbolic links in a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from megapoly.errors import CheckpointError


def check_links(folder: Path) -> None:
    """Refuse links that leave a folder: what they lead to would be copied, and later published.

    An import keeps settings, tokenizer and chat template. A link that came with the folder could
    make a private file one of them. Weights may be links: only what is safetensors is read. In the
    cache of the hub the files of ``snapshots/REVISION`` are links to ``blobs``.

    Raises:
        CheckpointError: a file that is not ``*.safetensors`` is such a link.
    """
    root = folder.resolve()
    inside = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    for path in sorted(folder.iterdir()):
        if not path.is_symlink() or path.suffix == ".safetensors":
            continue
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise CheckpointError(
                f"Files of {folder} must be in it, since an import copies some; `{path.name}` is a "
                f"link to {target}. Replace the link by the file, if you want it, or delete it."
            )
