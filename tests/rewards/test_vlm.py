"""The vision-language judge against a server on this machine: what it asks, keeps, waits for and refuses."""

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from twinrl.config.errors import InputError
from twinrl.rewards import build_reward
from twinrl.rewards.reward import RewardContext
from twinrl.rewards.vlm import VLM
from twinrl.training import schema

PROMPTS = ["a dark picture", "a bright one"]


class Server:
    """Answers as told; remembers requests."""

    def __init__(self, answer: Callable[[int, dict[str, Any]], tuple[int, str]]):
        self.asked: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.together, self.most, lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    outer.asked.append((dict(self.headers), body | {"path": self.path}))
                    number = len(outer.asked)
                    outer.together += 1
                    outer.most = max(outer.most, outer.together)
                status, text = answer(number, body)
                reply = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
                with lock:
                    outer.together -= 1
                self.send_response(status)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., Server]]:
    monkeypatch.setenv("TWINRL_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[Server] = []

    def serve(answer: Callable[[int, dict[str, Any]], tuple[int, str]]) -> Server:
        servers.append(Server(answer))
        return servers[-1]

    yield serve
    for each in servers:
        each.server.shutdown()
        each.server.server_close()


def judge(server: Server, **more: Any) -> VLM:
    config = VLM.Config(url=server.url, model="m", retries=more.pop("retries", 0), **more)
    made = build_reward(config, training=False)
    assert isinstance(made, VLM)
    return made


def image(level: float) -> torch.Tensor:
    return torch.full((3, 4, 4), level)


def level_of(body: dict[str, Any]) -> int:
    """Grey of the picture that was sent."""
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    with Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))) as sent:
        return int(sent.getpixel((0, 0))[0])  # type: ignore[index]


def test_marks_become_scores_in_the_order_of_the_images(served: Callable[..., Server]) -> None:
    server = served(lambda _, body: (200, "10" if level_of(body) > 128 else "The mark is 1."))
    scores = judge(server)(torch.stack([image(-1), image(1), image(1)]), [*PROMPTS, "c"])
    assert scores.tolist() == [0.0, 1.0, 1.0]
    told = sorted(body["messages"][0]["content"][0]["text"].rpartition("Prompt: ")[2] for _, body in server.asked)
    assert told == sorted([*PROMPTS, "c"])
    assert all(
        (body["path"], body["model"], body["temperature"]) == ("/v1/chat/completions", "m", 0)
        for _, body in server.asked
    )


def test_answers_are_kept_and_asked_for_once(served: Callable[..., Server]) -> None:
    server = served(lambda number, body: (200, "4"))
    images = torch.stack([image(0), image(0.5)])
    first = judge(server, low=0)(images, PROMPTS)
    assert torch.equal(judge(server, low=0)(images, PROMPTS), first)
    assert len(server.asked) == 2
    judge(server, low=0)(images, ["another prompt", PROMPTS[1]])
    assert len(server.asked) == 3


def test_images_go_out_together(served: Callable[..., Server]) -> None:
    gate = threading.Barrier(4, timeout=10)

    def wait(number: int, body: dict[str, Any]) -> tuple[int, str]:
        gate.wait()
        return 200, "5"

    server = served(wait)
    judge(server, parallel=4)(torch.stack([image(i / 10) for i in range(4)]), ["p"] * 4)
    assert server.most == 4


@pytest.mark.parametrize("said", ["no idea", "11", "0", "", "nan"])
def test_no_mark_in_the_range_is_nan_and_is_not_kept(served: Callable[..., Server], said: str) -> None:
    server = served(lambda number, body: (200, said if number == 1 else "7"))
    one = image(0)[None]
    assert judge(server)(one, PROMPTS[:1]).isnan().all()
    assert judge(server)(one, PROMPTS[:1]).item() == pytest.approx(6 / 9)


def test_a_busy_server_is_asked_again_and_a_refusal_is_not(served: Callable[..., Server]) -> None:
    server = served(lambda number, body: (503, "") if number == 1 else (200, "10"))
    assert judge(server, retries=2)(image(0)[None], PROMPTS[:1]).item() == 1
    refusing = served(lambda number, body: (401, ""))
    assert judge(refusing, retries=2)(image(0)[None], PROMPTS[:1]).isnan().all()
    assert len(refusing.asked) == 1


def test_a_server_that_hangs_or_is_away_costs_its_time_and_no_run(
    served: Callable[..., Server], caplog: pytest.LogCaptureFixture
) -> None:
    hold = threading.Event()

    def hang(number: int, body: dict[str, Any]) -> tuple[int, str]:
        hold.wait(20)
        return 200, "5"

    hanging = judge(served(hang), timeout=0.3)
    assert hanging(image(0)[None], PROMPTS[:1]).isnan().all()
    hold.set()
    away = build_reward(VLM.Config(url="http://127.0.0.1:9", model="m", retries=0), training=False)
    assert away(image(0)[None], PROMPTS[:1]).isnan().all()
    assert "1 of 1 images got no mark from http://127.0.0.1:9" in caplog.text


def test_the_token_comes_from_its_variable_and_is_written_nowhere(
    served: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_TOKEN", "secret-token")
    server = served(lambda number, body: (500, "") if number == 1 else (200, "5"))
    made = judge(server, token="MY_TOKEN")
    made(image(0)[None], PROMPTS[:1])
    made(image(0)[None], PROMPTS[:1])
    assert server.asked[0][0]["Authorization"] == "Bearer secret-token"
    assert not any(b"secret-token" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert "secret-token" not in caplog.text + made.config.model_dump_json()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("{kind: vlm, url: 'ftp://x', model: m}", "expected http://"),
        ("{kind: vlm, url: 'http://user:pw@x', model: m}", "holds a secret"),
        ("{kind: vlm, url: 'http://x?key=1', model: m}", "holds a secret"),
        ("{kind: vlm, url: 'http://x', model: m, low: 5, high: 5}", "low is not below high"),
        ("{kind: vlm, url: 'http://x', model: m, question: 'how {good}'}", "unknown field 'good'"),
    ],
)
def test_settings_that_are_refused(settings: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        schema.load("lab", [f"judges.eye={settings}"])
    assert "pw" not in str(error.value)


def test_training_never_follows_it() -> None:
    with pytest.raises(InputError, match="judges the result; fix: use it in judges"):
        VLM(VLM.Config(url="http://x", model="m"), RewardContext())
