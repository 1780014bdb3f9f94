"""Folders of a run on a disk, or in a bucket: files are written whole, or line by line.

A path such as `gs://bucket/runs/a` is an `etils.epath.Path`, any other a `pathlib.Path`; the two
have the same methods. A bucket cannot rename, append or hold an empty folder, but what is put into
it appears as a whole. So on a disk a file is written under another name and renamed, and in a
bucket it is written at once; nothing but these functions knows which.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import time
from types import TracebackType
from typing import Any

from etils import epath

Path = pathlib.Path | epath.Path
REWRITE_SECONDS = 30.0  # how often the lines of a file in a bucket are written again, at most


def path(name: str | os.PathLike) -> Path:
    """The path of a file or folder on a disk or in a bucket."""
    return epath.Path(name) if in_bucket(name) else pathlib.Path(name)


def in_bucket(name: str | os.PathLike) -> bool:
    """Whether a path names something in a bucket, `gs://...` for example."""
    return "://" in os.fspath(name)


def absolute(name: str | os.PathLike) -> Path:
    """The path without reference to the working directory."""
    return path(name) if in_bucket(name) else pathlib.Path(name).absolute()


def names_inside(name: str) -> bool:
    """Whether a name that a file gives for another file stays in that file's folder.

    The name decides, and not where a link leads, because the hub's cache is made of links.
    """
    parts = pathlib.PurePath(name).parts
    return bool(parts) and not os.path.isabs(name) and ".." not in parts and "\0" not in name


def check_file(file: Path) -> None:
    """Raises ValueError for what is there but is neither a file nor a folder: a pipe, a device.

    Reading such a thing may never end, so it has to be asked before the path is opened.
    """
    if file.exists() and not file.is_file() and not file.is_dir():
        raise ValueError(
            f"{file}: a pipe or a device, not a file; write what it holds into a file and name that"
        )


def is_file(file: Path) -> bool:
    """Whether there is a file. Raises ValueError for a folder, a pipe or a device in its place."""
    check_file(file)
    if file.is_dir():
        raise ValueError(f"{file}: a folder, where a file belongs; remove it")
    return file.is_file()


def check_output(option: str, file: Path, *inputs: Path) -> None:
    """Raises ValueError, before any work is done, where `file` cannot be written.

    `option` is what the user names it by. A file that is there is replaced, but no folder, pipe or
    device, and none of the `inputs` that the work is done on.
    """
    if file.is_dir():
        raise ValueError(f"{option} {file}: a folder; name a file in it")
    if file.exists() and not file.is_file():
        raise ValueError(f"{option} {file}: a pipe or a device, not a file; name a file")
    if not file.parent.is_dir():
        raise ValueError(f"{option} {file}: {file.parent} is not a folder; create it first")
    if not in_bucket(file) and not os.access(file.parent, os.W_OK):
        raise ValueError(
            f"{option} {file}: nothing can be written into {file.parent}; name another"
        )
    for given in inputs:
        if file.exists() and given.exists() and file.resolve() == given.resolve():
            raise ValueError(f"{option} {file} would replace what is read; name another file")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file in UTF-8, with or without a byte order mark.

    Raises ValueError, on one line that names the file, for anything else.
    """
    check_file(file)
    remedy = "restore the file"
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}:{error.lineno}: not JSON ({error.msg}); {remedy}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason}); {remedy}") from None
    except RecursionError:
        raise ValueError(f"{file}: its brackets are nested too deep; {remedy}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ValueError(f"{file}: unusable JSON ({error}); {remedy}") from None
    except OSError as error:  # it is missing, a folder, or may not be read
        raise ValueError(f"{file}: cannot be read ({error.strerror}); {remedy}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: must hold a JSON object, not a {type(found).__name__}; {remedy}")
    return found


def write(file: Path, content: str | bytes) -> None:
    """Writes a file such that readers see its old or its new content, and never a part of one."""
    content = content.encode() if isinstance(content, str) else content
    if in_bucket(file):
        file.write_bytes(content)
        return
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, file)
    except BaseException:  # a full disk, a folder of this name, ctrl-C
        temporary.unlink(missing_ok=True)
        raise


def remove(folder: Path) -> None:
    """Removes a folder with all that is in it, if there is one."""
    with contextlib.suppress(FileNotFoundError):
        folder.rmtree() if in_bucket(folder) else shutil.rmtree(folder)


def free(folder: Path) -> int:
    """Bytes that may still be written to the disk of a folder."""
    return shutil.disk_usage(folder).free


class Lines:
    """A text file that grows by lines.

    On a disk each line is written at once. A file in a bucket can only be replaced; that is done on
    closing, by `flush`, and where the last time is `REWRITE_SECONDS` ago.
    """

    def __init__(self, file: Path):
        self._file, self._opened, self._text = file, None, ""
        if in_bucket(file):
            self._text = file.read_text() if file.exists() else ""
            self._written, self._when = self._text, time.monotonic()
        else:
            self._opened = file.open("a", encoding="utf-8")

    def write(self, line: str) -> None:
        """Adds a line, which ends in a line break."""
        if self._opened is not None:
            self._opened.write(line)
            self._opened.flush()
            return
        self._text += line
        if time.monotonic() - self._when >= REWRITE_SECONDS:
            self._put()

    def flush(self) -> None:
        """Writes what is not yet in the file."""
        if self._opened is None and self._text != self._written:
            self._put()

    def close(self) -> None:
        """Writes what is left."""
        self.flush()
        if self._opened is not None:
            self._opened.close()

    def _put(self) -> None:
        write(self._file, self._text)
        self._written, self._when = self._text, time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self, kind: type | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
