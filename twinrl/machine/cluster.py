"""Ray: started on this machine, or joined where it runs already.

A cluster may ask for a token. Ray (2.60) switches that on by itself in ``ray start --head`` where a token exists, and
every local session makes one (``~/.ray/auth_token``), but sends it only to the address ``auto``, not to
``host:port``. Here both are treated alike: what token this machine has is sent, unless ``RAY_AUTH_MODE`` says
otherwise; a cluster without authentication takes no notice. A cluster is asked in a process of its own before
Ray joins it, because Ray itself would retry for minutes, or end this process where the token is missing.
"""

import atexit
import logging
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import wait
from pathlib import Path
from typing import Any

from twinrl.config.errors import InputError
from twinrl.machine import aftermath
from twinrl.machine.aftermath import end_all_of
from twinrl.machine.background import in_background

LISTEN_SECONDS, PROBE_SECONDS = 5, 60
STORE_BYTES = 100 * 2**20
PROBE = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
LOOK_SECONDS, LOSS_SECONDS, STOP_SECONDS = 2, 8, 5
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""No usage reports, no folders of its own."""
AUTHENTICATION_ERRORS = ("Unauthenticated", "AuthenticationError", "InvalidAuthToken", "authentication token")
"""Words by which Ray says that it is a matter of the token."""
TOKEN_FIX = (
    "copy ~/.ray/auth_token of the cluster's head here (`ray get-auth-token` there prints it; RAY_AUTH_TOKEN takes it, "
    "too) and unset RAY_AUTH_MODE"
)


def connect(address: str | None, cpus: int, option: str, variables: Mapping[str, str] = QUIET) -> None:
    """Start a Ray of ``cpus`` cores on this machine, or join the one at ``address``.

    A start is tried twice: a busy machine may need longer than the 30 seconds that Ray gives its node.

    Arguments:
        address: ``host:port`` or ``auto``; None starts one.
        cpus: cores of one that is started.
        option: what the user calls the address, for messages.
        variables: environment of all workers, which find this checkout and the command's folder, and of this process.

    Raises:
        InputError: there is no cluster, it wants another token, or Ray does not start.
    """
    import ray

    os.environ.update(variables)
    logging.getLogger("ray").setLevel(logging.CRITICAL)  # failures are reported in one line
    options: dict[str, Any] = {"runtime_env": {"env_vars": {**variables, "PYTHONPATH": python_path()}}}
    if address is None:
        options |= {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": STORE_BYTES}
    else:
        use_token()
        if address != "auto":
            probe(address, option)
    for more in (address is None, False):
        try:
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.CRITICAL, **options)
            _leave_out_last_words()
            _take_care_of_the_end()
            return
        except Exception as error:  # Ray raises that very class where a node does not start in its 30 s
            ray.shutdown()
            if not more:
                raise refusal(address, _whole(error), option) from error


def _leave_out_last_words() -> None:
    """Ray prints the end of the log of a node that dies; that it has died is said in one line."""
    from ray._private import worker

    shown = worker.print_to_stdstream

    def print_others(data: dict[str, Any], *arguments: Any, **named: Any) -> None:
        if not any("Raylet is terminated" in line for line in data["lines"]):
            shown(data, *arguments, **named)

    worker.print_to_stdstream = print_others


def _take_care_of_the_end() -> None:
    """Start what ends the agents of a session of this process, should it die with Ray's head."""
    session = _own_session()
    if session is None:
        return
    command = [sys.executable, "-m", aftermath.NAME, *map(str, session)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    _waiting.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, start_new_session=True))


_waiting: list[subprocess.Popen[bytes]] = []
"""Wait for the end of this process, or of its session: their pipes stay open until then."""


def _own_session() -> tuple[str, int] | None:
    """Folder and node process of the session that this process has started; None if it has joined one."""
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or not node.head or not (started := node.all_processes.get("raylet")):
        return None
    return node.get_session_dir_path(), started[0].process.pid


class LostError(Exception):
    """Ray's node on this machine, the cluster's head or all of its machines have gone; the message is one line."""


class Watch:
    """Looks whether the Ray that this process has joined is still there. Ray itself would wait for it for ever.

    Arguments:
        fits: whether there is a machine left for the work; asked in a thread, since Ray may not answer.

    *When to use*: by the thread that has the signals, while another one waits for Ray.
    """

    def __init__(self, fits: Callable[[], bool] = lambda: True) -> None:
        from ray._private import worker

        node: Any = worker._global_node
        self.node = socket.socket(socket.AF_UNIX)  # held open: its end is that of the node
        self.node.connect(node.raylet_socket_name)
        self.node.setblocking(False)
        self.head = node.gcs_address
        self.fits, self.asked, self.room = fits, in_background(fits), True
        self.looked = self.there = time.monotonic()

    def check(self) -> None:
        """Raises LostError where the node has gone, or what else it takes has been away for some seconds."""
        if _closed(self.node):
            raise LostError("Ray's node on this machine has gone")
        if time.monotonic() - self.looked < LOOK_SECONDS:
            return
        away = self._away()
        self.looked = time.monotonic()
        if away is None:
            self.there = self.looked
        elif self.looked - self.there > LOSS_SECONDS:
            raise LostError(f"{away} has gone")

    def _away(self) -> str | None:
        if self.asked.done():
            self.room = self.asked.exception() is not None or self.asked.result()
            self.asked = in_background(self.fits)
        host, _, port = self.head.rpartition(":")
        try:
            socket.create_connection((host, int(port)), LISTEN_SECONDS).close()
        except OSError:
            return f"the head of the Ray cluster at {self.head}"
        return None if self.room else "the last machine of the cluster that a trial fits on"


def _closed(connection: socket.socket) -> bool:
    """Whether the other side, which has nothing to say, has closed a connection."""
    try:
        return connection.recv(1) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def leave() -> None:
    """End the session, or leave the cluster: also one that does not answer any more, and nothing of it is left."""
    import ray

    session = _own_session()  # known until it is ended
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"  # or a thread that still works would join again, for a minute
    wait([in_background(ray.shutdown)], STOP_SECONDS)
    atexit.unregister(ray.shutdown)  # which would wait again
    if session is not None:
        end_all_of(*session)
    while _waiting:
        _waiting.pop().communicate()


def python_path() -> str:
    """Where workers find this checkout, and classes of one's own beside the command."""
    here = [str(Path(__file__).resolve().parents[2]), str(Path.cwd())]
    return os.pathsep.join(dict.fromkeys([*here, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))


def use_token() -> None:
    """Send this machine's token with every request, if it has one and ``RAY_AUTH_MODE`` is not set."""
    try:
        from ray._private.authentication import authentication_token_setup
    except ImportError:  # a Ray that knows no tokens
        return
    if hasattr(authentication_token_setup, "maybe_enable_token_auth_if_token_available"):
        authentication_token_setup.maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def probe(address: str, option: str) -> None:
    """Raises InputError within seconds where no cluster answers, or not to this machine's token."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()):
        raise InputError(f"{option} {address!r} is no address", expected="host:port, or auto")
    try:
        socket.create_connection((host, int(port)), timeout=LISTEN_SECONDS).close()
    except (OSError, OverflowError) as error:  # the second where the port is too large a number
        raise refusal(address, str(error), option) from error
    try:
        asked = subprocess.run(
            [sys.executable, "-c", PROBE, address], capture_output=True, text=True, check=False, timeout=PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise refusal(address, f"no answer in {PROBE_SECONDS} s", option) from None
    if asked.returncode:
        raise refusal(address, asked.stderr, option)


def refusal(address: str | None, why: str, option: str) -> InputError:
    """The error for a cluster that can't be joined, by what Ray said."""
    if any(word in why for word in AUTHENTICATION_ERRORS):
        return InputError(
            f"the Ray cluster at {address} does not take this machine's authentication token", got=_token_state(),
            fix=TOKEN_FIX,
        )  # fmt: skip
    reason = (why.strip().splitlines() or ["no answer"])[-1]
    if address is None:
        return InputError("Ray does not start on this machine", got=reason)
    return InputError(
        f"no Ray cluster at {address}", got=reason, fix=f"start one (`ray start --head`), or leave {option} out"
    )


def _token_state() -> str:
    mode = os.environ.get("RAY_AUTH_MODE")
    if mode == "token":
        return "a token that is not the cluster's, or none"
    return f"RAY_AUTH_MODE={mode}" if mode else "no token on this machine"


def _whole(error: BaseException) -> str:
    """What an error says, after that what caused it says; there Ray puts the reason."""
    return str(error) if error.__cause__ is None else f"{error.__cause__}\n{error}"
