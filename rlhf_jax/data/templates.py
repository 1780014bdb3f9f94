"""Chat templates, rendered by a process of their own, in which they can do no harm.

A template is a program that comes with somebody's model. jinja's sandbox keeps it from files,
modules and the attributes of Python's objects, but not from running for ever or from making a text
of gigabytes, and one process cannot interrupt itself in the middle of such an operation. So this
file is also a script, which renders what it reads from its standard input. The operating system
ends it where a template takes more processor time or memory than it may. It is started when the
first template is rendered, and again after such an end; it ends with the process that started it.

A template sees what it sees in transformers: the same settings, filters and names.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox

SECONDS = 10.0  # of processor time that one rendering may take; a usual one takes a millisecond
MEMORY = 2**30  # bytes of addresses that the process may use, of which Python takes a tenth
CHARACTERS = 10_000_000  # of a rendered text


class Unfit(ValueError):
    """The fault is the template's: no template, or one that does not end or takes too much."""


class Refused(ValueError):
    """The template does not render these messages."""


def render(template: str, variables: dict[str, Any]) -> str:
    """The text of a template under its variables, which are what JSON can hold.

    May be called from any thread. Raises `Unfit` where the template is no jinja template, recurses
    without end, or needs more than `SECONDS` or `MEMORY`; `Refused` where it raises an error, or
    renders nothing or more than `CHARACTERS`.
    """
    kind, text = _worker.ask({"template": template, "variables": variables})
    if kind == "unfit":
        raise Unfit(text)
    if kind == "refused":
        raise Refused(text)
    return text


class _Worker:
    """The process that renders, as the process that asks it sees it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None

    def ask(self, request: dict[str, Any]) -> tuple[str, str]:
        """(how it ended, the text or what was wrong)."""
        with self._lock:
            if self._process is None:
                self._process = _started()
            try:
                self._process.stdin.write(json.dumps(request | {"seconds": SECONDS}) + "\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except BrokenPipeError:
                answer = ""
            except BaseException:  # such as ctrl-C: the answer must not be taken for the next one's
                self.close()
                raise
            if answer:
                kind, text = json.loads(answer)
                return kind, text
            return "unfit", _how_it_ended(self.close())

    def close(self) -> int | None:
        """Ends the process, if there is one, and returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()  # one that has ended by itself keeps its exit code
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):  # what was still to be sent has no reader
            process.stdin.close()
        return process.wait()


def _started() -> subprocess.Popen:
    # -P: the folder of this script, whose modules have common names, is not imported from.
    return subprocess.Popen(
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="ascii",
        start_new_session=True,  # a ctrl-C is for the process that asks
    )


def _how_it_ended(code: int | None) -> str:
    if code == -signal.SIGPROF:
        return f"did not end within {SECONDS:g} s of processor time"
    if code == -signal.SIGSEGV:
        return "goes too deep: it ended its process by a stack overflow"
    return f"ended the process that renders it (exit code {code})"


_worker = _Worker()
atexit.register(_worker.close)
# A fork needs one of its own: of two that ask the same process, each could read the other's answer.
os.register_at_fork(after_in_child=_worker.__init__)


# --- in the process that renders ------------------------------------------------------------------


class _Generation(jinja2.ext.Extension):
    """Ignores {% generation %} and {% endgeneration %}, which mark what the assistant says."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@functools.lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        # Unlike jinja's own filter, it leaves <, > and & as they are.
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment.from_string(template)


def _answer(request: dict[str, Any]) -> tuple[str, str]:
    """(how it ended, the text or what was wrong) of one request."""
    try:
        template = _compiled(request["template"])
    except jinja2.TemplateError as error:
        return "unfit", f"is no jinja template ({error})"
    except (RecursionError, SyntaxError):  # of the Python that jinja makes of it
        return "unfit", "is nested too deep"
    except MemoryError:
        return "unfit", _TOO_LARGE
    try:
        text = template.render(request["variables"])
    except RecursionError:
        return "unfit", "recurses without end"
    except MemoryError:
        return "unfit", _TOO_LARGE
    except (jinja2.TemplateError, *_ERRORS) as error:
        return "refused", str(error) or type(error).__name__
    if len(text) > CHARACTERS:
        return "refused", f"{len(text):,} characters, of which {CHARACTERS:,} are allowed"
    if not text.strip():
        return "refused", "it writes nothing for them"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "refused", "it writes half a surrogate pair, which is no text"
    return "text", text


_TOO_LARGE = f"needs more than {MEMORY:,} bytes of memory"
# What Python raises for an operation that its values do not allow.
_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def _serve() -> None:
    """Answers the requests of standard input, one a line."""
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY if most == resource.RLIM_INFINITY else min(MEMORY, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        request = json.loads(line)
        # Its signal ends the process, also in the middle of one operation on a long text.
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        answer = _answer(request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
