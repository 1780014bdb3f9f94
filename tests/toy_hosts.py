"""One of two processes that launch what must be refused; tests start it and read its report.

    python toy_hosts.py PORT PROCESS_ID

It stands in a folder of its own, so that a relative path means another place on each host.
"""

import contextlib
import io
import json
import sys

import jax

from rlhf_jax.config import Config, Source
from rlhf_jax.launch import launch


class Toy(Config):
    """An experiment of one number and one file."""

    rate: float = 0.1
    words: Source = ""


def run(config, context):
    """Trains nothing."""
    del config, context
    return {"processes": jax.process_count()}


def main(port, process):
    """Launches each case and prints what came of it, as one line of JSON."""
    joined = f"--coordinator localhost:{port} --num-processes 2 --process-id {process}"
    cases = {
        "workdir missing": "",
        "workdir not shared": "--workdir run",
        "settings": f"--workdir ../run --rate 0.{process}",
        "files": "--workdir ../run --words words.jsonl",
        "mesh": "--workdir ../run --mesh fsdp=1",
        "only here": f"--workdir ../run --data {'.' if process == '0' else 'absent'}",
        "good": "--workdir ../run",
        "another run": "--workdir ../run --rate 0.5",
        "finished": "--workdir ../run",
    }
    found = {}
    for name, flags in cases.items():
        error, code, summary = io.StringIO(), 0, None
        with contextlib.redirect_stderr(error):
            try:
                summary = launch(run, Toy(), [*joined.split(), *flags.split()])
            except SystemExit as exit:
                code = exit.code
        found[name] = {"code": int(code), "error": error.getvalue(), "summary": summary}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
