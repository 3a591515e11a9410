"""New processes of this Python that have imported konic and its libraries already: ready in 20 ms instead of 4 s.

A server imports them and is forked for each process; it reads nothing of a test and keeps nothing of one. Where that
could make a difference, a process is started as usual: another interpreter, an option of Python or of Popen, or another
value of an environment variable that a library may read while it is imported.
"""

import atexit
import ctypes
import gc
import inspect
import json
import os
import socket
import subprocess
import sys
import warnings

READ_LATER = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONUNBUFFERED", "PYTEST_CURRENT_TEST",
)  # fmt: skip
"""Environment variables that nothing reads while it is imported."""
PLAIN = {
    "executable": None,
    "preexec_fn": None,
    "pass_fds": (),
    "shell": False,
    "umask": -1,
    "start_new_session": False,
}
"""Arguments of Popen that a forked process follows with these values alone."""
CHILD_SUBREAPER = 36
"""PR_SET_CHILD_SUBREAPER of <linux/prctl.h>: a process whose parent has ended becomes a child of this one."""
_servers = []


def run(command, timeout=None, check=False, capture_output=False, **options):
    """What `subprocess.run` does."""
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} if capture_output else {}
    with Popen(command, **options) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


class Popen(subprocess.Popen):
    """`subprocess.Popen`, whose process is forked from the server where it can be."""

    def _execute_child(self, *values):
        given = inspect.signature(super()._execute_child).bind(*values).arguments
        request = request_of(given)
        if request is None:
            super()._execute_child(*values)
            return
        pipes = {name: given[name] for name in ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")}
        streams = [pipes["p2cread"], pipes["c2pwrite"], pipes["errwrite"]]
        self.pid = server().start(request, [fd if own == -1 else own for fd, own in enumerate(streams)])
        self._child_created = True
        self._close_pipe_fds(*pipes.values())


def request_of(given):
    """What the server needs for a process; None if it has to be one of its own."""
    python, *arguments = map(os.fspath, given["args"])
    ignores_warnings = arguments[:2] == ["-W", "ignore"]
    if ignores_warnings:
        arguments = arguments[2:]
    environment = dict(os.environ if given["env"] is None else given["env"])
    is_plain = all(given.get(name, value) == value for name, value in PLAIN.items())
    if not (sys.platform == "linux" and is_plain and python == sys.executable and arguments):
        return None
    if arguments[0].startswith("-") and arguments[0] not in ("-c", "-m"):
        return None
    if imported_with(environment) != imported_with(server().environment):
        return None
    return {
        "arguments": arguments, "ignores_warnings": ignores_warnings, "environment": environment,
        "folder": os.path.abspath(given["cwd"] or "."),
    }  # fmt: skip


def imported_with(environment):
    """The variables that may matter to an import."""
    return {name: value for name, value in environment.items() if name not in READ_LATER}


def server_ids():
    """The process ids of servers that this process has started."""
    return [server.pid for server in _servers]


def server():
    """The server of this process, which ends with it."""
    if not _servers:
        _servers.append(Server())
    return _servers[0]


class Server:
    """The process that is forked."""

    def __init__(self):
        self.environment = dict(os.environ)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, __file__, str(theirs.fileno())]
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.pid = self._process.pid
        atexit.register(self._end)

    def _end(self):
        self._socket.close()
        self._process.wait()

    def start(self, request, streams):
        """The id of a process that is a child of this one."""
        prctl = ctypes.CDLL(None).prctl
        prctl(CHILD_SUBREAPER, 1, 0, 0, 0)
        try:
            socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
            return int(self._socket.recv(32))
        finally:
            prctl(CHILD_SUBREAPER, 0, 0, 0, 0)


def forked(requests):
    """In the server: answer requests until there are no more. Returns in each new process, with its request."""
    while True:
        content, streams, _, _ = socket.recv_fds(requests, 2**20, 3)
        if not content:
            os._exit(0)
        read, write = os.pipe()
        middle = os.fork()
        if middle == 0:
            child = os.fork()
            if child == 0:
                os.close(read)
                os.close(write)
                break
            os.write(write, str(child).encode())
            os._exit(0)
        os.waitpid(middle, 0)  # from now on the child's parent is the process that asked for it
        requests.send(os.read(read, 32))
        for number in (read, write, *streams):
            os.close(number)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return json.loads(content)


def become(request):
    """Make this process what Python is when it starts: its environment, folder, streams and arguments."""
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    if request["ignores_warnings"]:
        warnings.simplefilter("ignore")
    for stream in (sys.stdout, sys.stderr):
        is_unbuffered = "PYTHONUNBUFFERED" in os.environ
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty(), write_through=is_unbuffered)
    sys.argv = request["arguments"]


def run_program():
    """Run what `sys.argv` names, as Python's command line would, in a `__main__` that holds nothing else."""
    import os
    import runpy
    import sys

    what, *arguments = sys.argv
    space = vars(sys.modules["__main__"])
    for name in [name for name in space if name not in ("__name__", "__builtins__", "__spec__")]:
        del space[name]
    if what == "-m":
        sys.path[0], sys.argv = os.getcwd(), arguments
        runpy._run_module_as_main(arguments[0])
    elif what == "-c":
        sys.path[0], sys.argv = "", ["-c", *arguments[1:]]
        exec(compile(arguments[0], "<string>", "exec"), space)
    else:
        space["__file__"] = os.path.abspath(what)
        sys.path[0] = os.path.dirname(space["__file__"])
        with open(what, encoding="utf-8") as script:
            code = compile(script.read(), what, "exec")
        exec(code, space)


if __name__ == "__main__":
    import pytest  # noqa: F401  some processes take their parts from tests

    import konic.cli.jobs
    import konic.finetuning.engine  # noqa: F401

    gc.freeze()  # a collection in a new process would copy the memory that all share
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        become(forked(requests))
    run_program()
