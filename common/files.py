"""Files: written whole or not at all, read as UTF-8, with one kind of error, which names the file.

Every reader raises ValueError for any missing, truncated, mis-encoded, oversized or too deeply nested file.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

MAX_BYTES = 2**31  # no text of this project is larger; a sparse or endless file is refused before it is read


def write_atomically(path, write: Callable[[str], None]) -> None:
    """Call `write(temporary path)`, flush it to disk, rename it: a kill at any time leaves the old file or the new.

    Raises: ValueError naming a file that cannot be written (no room, no permission, a folder in its place).
    """
    path = Path(path)
    temporary = Path(f"{path}.tmp{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(str(temporary))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: cannot be written ({reason})") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def write_text(path, text: str) -> None:
    """A UTF-8 text file, whole or not at all."""
    write_atomically(path, lambda temporary: Path(temporary).write_text(text, encoding="utf-8"))


def write_json(path, value, indent: int | None = 1) -> None:
    """`value` as JSON, whole or not at all. Raises: ValueError for NaN and infinity, which JSON cannot express."""
    write_text(path, json.dumps(value, indent=indent, allow_nan=False) + "\n")


def read_text(path, hint: str = "") -> str:
    """A UTF-8 text file. hint: how to make it, added to the error when it is not there."""
    path = Path(path)
    try:
        if not path.exists():
            raise ValueError(f"{path}: no such file" + (f"; {hint}" if hint else ""))
        if not path.is_file():
            raise ValueError(f"{path}: expected a file")
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"{path}: larger than {MAX_BYTES} bytes")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(text: str, where: str, expected: type = object):
    """JSON text -> value. where: named in the error. expected: the type of the value (dict, list)."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(value, expected):
        name = {dict: "a JSON object", list: "a JSON list"}[expected]
        raise ValueError(f"{where}: expected {name}, got {type(value).__name__}")
    return value


def read_json(path, expected: type = object, hint: str = ""):
    """The value in a JSON file."""
    return parse_json(read_text(path, hint), str(path), expected)


def read_json_lines(path, hint: str = "") -> Iterator[tuple[int, dict]]:
    """(line number from 1, object) for each line of a .jsonl file. Raises: ValueError naming file and line."""
    for number, line in enumerate(read_text(path, hint).splitlines(), 1):
        yield number, parse_json(line, f"{path}, line {number}", dict)


def read_npz(path, names: tuple[str, ...], hint: str = "") -> dict[str, np.ndarray]:
    """The arrays `names` of an .npz file. Nothing in it is ever unpickled. hint: how to make it."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in names}
    except Exception as error:  # a truncated or damaged archive makes numpy raise nearly anything
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path}: cannot be read ({reason})" + (f"; {hint}" if hint else "")) from None
