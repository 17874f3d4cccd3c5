"""Text and JSON in files, read with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from .errors import FormatError, NotFoundError


def read_text(path: Path, remedy: str = "") -> str:
    """A file's text. Raises NotFoundError, with the remedy, or FormatError."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise NotFoundError(f"{path} is missing", remedy) from None
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not valid UTF-8: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file. Raises NotFoundError or FormatError."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds no JSON object")
    return value
