"""MLflow's application behind an exact check of who asks; ``twinrl ui`` serves it in MLflow's place.

MLflow lets in every host name that begins like a private address, and pages of every other port of this machine. So
a web page could rebind its own name to this machine and read, change or delete the store. Here a request must name one
of the addresses that were printed, and what a page sends must come from one of them.
"""

import os
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

ADDRESSES = "TWINRL_UI_ADDRESSES"
"""Environment variable: the ``host:port`` by which the server is reached, separated by commas."""

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class Guard:
    """An ASGI application that answers 403 to requests for, or from, anywhere else.

    Arguments:
        application: to be guarded.
        addresses: ``host:port`` of the server, as browsers write them.
    """

    def __init__(self, application: Callable[[Scope, Receive, Send], Awaitable[None]], addresses: Iterable[str]):
        self.application = application
        self.hosts = {address.encode() for address in addresses}
        self.origins = {b"http://" + host for host in self.hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self.admits(scope["headers"]):
            await self.application(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            plain = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": 403, "headers": plain})
            await send({"type": "http.response.body", "body": b"this address is not one of the server's"})

    def admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """Whether all that the headers say of host and origin is this server's."""
        hosts = [value for name, value in headers if name == b"host"]
        origins = [value for name, value in headers if name == b"origin"]
        return len(hosts) == 1 and hosts[0] in self.hosts and self.origins.issuperset(origins)


def application() -> Guard:
    """The MLflow application for the addresses in the environment."""
    from mlflow.server.fastapi_app import app as mlflow

    return Guard(mlflow, os.environ[ADDRESSES].split(","))
