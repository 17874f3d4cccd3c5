"""Where weights come from: names and downloads (resolve), Hugging Face folders, GGUF files."""

from pathlib import Path

from ..errors import NotFoundError, UnsupportedError
from .base import Checkpoint
from .folder import FolderCheckpoint
from .gguf_model import GgufCheckpoint

__all__ = ["Checkpoint", "open_checkpoint"]


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at a local path: a Hugging Face folder, or a GGUF file.

    Raises NotFoundError, FormatError or UnsupportedError.
    """
    if path.is_dir():
        if not (path / "config.json").exists() and (found := sorted(path.glob("*.gguf"))):
            raise NotFoundError(f"{path} has no config.json, but GGUF files", f"Name one of them: {found[0]}")
        return FolderCheckpoint(path)
    if not path.exists():
        raise NotFoundError(f"{path} does not exist")
    if path.suffix == ".gguf":
        return GgufCheckpoint(path)
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(
            f"{path.name} is a pickle file, which can run code when it is read",
            "Convert it to safetensors, for example with transformers' save_pretrained.",
        )
    remedy = "Name the folder that holds it and config.json." if path.suffix == ".safetensors" else ""
    raise UnsupportedError(f"{path} is neither a folder nor a .gguf file", remedy)
