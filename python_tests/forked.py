"""Code in fresh processes that cost little: a server has imported torch, and forks a child for each request.

What is read when pysparse is imported, such as its environment variables, is read in the child, as at any start.
"""

import atexit
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

SERVER = """
import json, os, sys, tempfile, traceback
import torch

def run(request, out, err):
    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    os.environ.update(request["environment"])
    sys.argv = ["-c", *request["arguments"]]
    status = 0
    try:
        exec(request["code"], {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            run(json.loads(line), out, err)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        for file in (out, err):
            file.seek(0)
        print(json.dumps([status, out.read(), err.read()]), flush=True)
"""


@dataclass(frozen=True)
class Done:
    """How a child ended, by the names of subprocess.CompletedProcess."""

    returncode: int
    stdout: str
    stderr: str


@cache
def _server():
    paths = ["-P"] if sys.flags.safe_path else []
    command = [sys.executable, *paths, "-c", SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def close():
        server.stdin.close()
        server.stdout.close()
        server.wait()

    atexit.register(close)
    return server


def run(code, *arguments, **environment):
    """Run ``code`` where torch is imported and pysparse is not, with this process's environment and some more."""
    request = {
        "code": code,
        "arguments": [str(one) for one in arguments],
        "environment": {**os.environ, **environment},
    }
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return Done(*json.loads(server.stdout.readline()))
