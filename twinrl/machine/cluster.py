"""Ray: started on this machine, or joined where it runs already.

A cluster may ask for a token. Ray (2.60) switches that on by itself in ``ray start --head`` where a token exists, and
every local session makes one (``~/.ray/auth_token``), but sends it only to the address ``auto``, not to
``host:port``. Here both are treated alike: what token this machine has is sent, unless ``RAY_AUTH_MODE`` says
otherwise; a cluster without authentication takes no notice. A cluster is asked in a process of its own before
Ray joins it, because Ray itself would retry for minutes, or end this process where the token is missing.
"""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twinrl.config.errors import InputError

LISTEN_SECONDS, PROBE_SECONDS = 5, 60
STORE_BYTES = 100 * 2**20
PROBE = "import sys; from ray._raylet import GcsClient; GcsClient(address=sys.argv[1])"
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
            return
        except Exception as error:  # Ray raises that very class where a node does not start in its 30 s
            ray.shutdown()
            if not more:
                raise refusal(address, _whole(error), option) from error


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
