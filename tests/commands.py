"""Calls of the command, one after the other in this one process: exit status and output of each,
as JSON."""

import contextlib
import io
import json
import sys
import traceback

from simgrad.cli import main


def call(arguments):
    sys.argv = ["simgrad", *arguments]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            main()
            status = 0
        except SystemExit as done:
            status = done.code or 0
        except BaseException:
            traceback.print_exc()
            status = 1
    return {"returncode": status, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    print(json.dumps([call(arguments) for arguments in json.loads(sys.argv[1])]))
