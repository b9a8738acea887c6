"""Who may ask the MLflow server: those who use one of its printed addresses, exactly."""

import asyncio
from typing import Any

import pytest

from twinrl.tracking.guard import Guard

HERE = ("127.0.0.1:5000", "localhost:5000")


async def _application(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})


def status(*headers: tuple[str, str]) -> int:
    """What a request with these headers is answered."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers]}
    asyncio.run(Guard(_application, HERE)(scope, lambda: None, send))  # type: ignore[arg-type, return-value]
    return sent[0]["status"]


@pytest.mark.parametrize("host", HERE)
def test_its_own_addresses_are_let_in(host: str) -> None:
    assert status(("host", host)) == 200
    assert status(("host", host), ("origin", f"http://{host}")) == 200


@pytest.mark.parametrize(
    "host",
    [
        "10.evil.example", "10.evil.example:5000", "192.168.1.1.evil.example", "192.168.1.1", "172.16.0.1:5000",
        "localhost", "localhost:5001", "127.0.0.1", "localhost:5000.evil.example", "evil.example", "", "0.0.0.0:5000",
    ],
)  # fmt: skip
def test_other_hosts_are_refused(host: str) -> None:
    assert status(("host", host)) == 403


@pytest.mark.parametrize(
    "origin", ["http://localhost:5001", "https://localhost:5000", "http://evil.example", "null", "http://127.0.0.1"]
)
def test_other_origins_are_refused(origin: str) -> None:
    assert status(("host", HERE[0]), ("origin", origin)) == 403


def test_two_hosts_or_none_are_refused() -> None:
    assert status(("host", HERE[0]), ("host", HERE[1])) == 403
    assert status() == 403
