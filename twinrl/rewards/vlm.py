"""A judge that asks a vision-language model behind an OpenAI-compatible endpoint (vLLM, SGLang, a paid service).

    R(y, c) = (the number in the answer − low) / (high − low)

The request is that of ``POST /chat/completions`` with the image as a PNG in a data URL; images go out several at once,
and an answer is kept in the cache, keyed by everything that was sent. An image that gets no answer, or one without a
number in the range, has the score nan: validation reports it, and goes on.
"""

import base64
import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from twinrl.config import Settings
from twinrl.config.errors import InputError
from twinrl.machine import files
from twinrl.machine.pixels import as_uint8
from twinrl.rewards.reward import WITHOUT_SOURCE, Reward, RewardContext, check_batch

if TYPE_CHECKING:
    import requests

QUESTION = (
    "Here is a picture that was made for the prompt below. How well does it show what the prompt asks for, and how "
    "good a picture is it? Answer with one number from {low} to {high}, and nothing else.\n\nPrompt: {prompt}"
)
BUSY = (429, 500, 502, 503, 504)
"""Statuses after which the request is made again, a little later each time."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_log = logging.getLogger(__name__)


class VLM(Reward):
    """A vision-language model's mark for an image and its prompt. It judges, and training never follows it.

    *When to use*: as a held-out judge of a family, where a preference model that is followed may have been fooled. The
    token is read from an environment variable and is written nowhere.

    Raises:
        InputError: training wants to follow it.
    """

    differentiable = False

    class Config(Settings):
        kind: Literal["vlm"] = "vlm"
        url: str = Field(description="base of the endpoint, e.g. http://localhost:8000/v1")
        model: str = Field(description="name of the model there")
        question: str = Field(QUESTION, description="text beside the image; {prompt}, {low} and {high} are filled in")
        low: float = Field(1, allow_inf_nan=False, description="worst mark: score 0")
        high: float = Field(10, allow_inf_nan=False, description="best mark: score 1")
        token: str = Field("OPENAI_API_KEY", pattern=r"^[A-Za-z_]\w*$", description="variable that holds the token")
        timeout: float = Field(60, gt=0, le=3600, description="seconds to wait for an answer")
        retries: int = Field(3, ge=0, le=20, description="further requests where the server is busy or away")
        parallel: int = Field(8, ge=1, le=256, description="requests at once")
        max_tokens: int = Field(16, ge=1, le=4096, description="longest answer")

        @field_validator("url")
        @classmethod
        def _is_an_address(cls, url: str) -> str:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"expected http://… or https://…, got {url!r:.60}")
            if parts.username or parts.password or parts.query:
                raise ValueError("the address holds a secret; fix: set the token's environment variable instead")
            return url.rstrip("/")

        @model_validator(mode="after")
        def _can_be_asked(self) -> "VLM.Config":
            if self.low >= self.high:
                raise ValueError(f"low is not below high, got {self.low:g} and {self.high:g}")
            try:
                self.question.format(prompt="", low=0, high=1)
            except (KeyError, IndexError, ValueError) as error:
                raise ValueError(f"question has an unknown field {error}; expected prompt, low, high") from error
            return self

    def __init__(self, config: Config, context: RewardContext = WITHOUT_SOURCE):
        super().__init__(config, context)
        if context.training:
            raise InputError(f"{context.key}: vlm has no gradient and judges the result", fix="use it in judges.<name>")
        self.cache = files.cache_dir() / "vlm"

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        check_batch(images, prompts, self.needs_prompts)
        pngs = [_png(image) for image in images]
        with self._session() as session, ThreadPoolExecutor(self.config.parallel) as pool:
            scores = list(pool.map(lambda pair: self._score(session, *pair), zip(pngs, prompts, strict=True)))
        if unanswered := sum(map(math.isnan, scores)):
            _log.warning(
                "%s: %d of %d images got no mark from %s", self.context.key, unanswered, len(scores), self.config.url
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _session(self) -> "requests.Session":
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        again = Retry(
            self.config.retries, status_forcelist=BUSY, allowed_methods=["POST"], backoff_factor=0.5,
            raise_on_status=False, redirect=0,
        )  # fmt: skip
        session = requests.Session()
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(max_retries=again, pool_maxsize=self.config.parallel))
        if token := os.environ.get(self.config.token):
            session.headers["Authorization"] = f"Bearer {token}"
        return session

    def _score(self, session: "requests.Session", png: bytes, prompt: str) -> float:
        config = self.config
        text = config.question.format(prompt=prompt, low=f"{config.low:g}", high=f"{config.high:g}")
        image = {"url": f"data:image/png;base64,{base64.b64encode(png).decode()}"}
        content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": image}]
        body = {
            "model": config.model, "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": config.max_tokens,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps([config.url, body], sort_keys=True).encode()).hexdigest()
        kept = self.cache / f"{key}.txt"
        if kept.is_file():
            return self._mark(kept.read_text())
        answer = self._asked(session, body)
        if answer is None or math.isnan(mark := self._mark(answer)):
            return math.nan
        self.cache.mkdir(parents=True, exist_ok=True)
        files.write_text(kept, answer)
        return mark

    def _asked(self, session: "requests.Session", body: dict[str, Any]) -> str | None:
        """The answer; None where there is none."""
        import requests

        try:
            reply = session.post(f"{self.config.url}/chat/completions", json=body, timeout=self.config.timeout)
            reply.raise_for_status()
            answer = reply.json()["choices"][0]["message"]["content"]
        except (requests.RequestException, ValueError, LookupError, TypeError) as error:
            _log.info("%s: no answer: %s", self.context.key, type(error).__name__)
            return None
        return answer if isinstance(answer, str) else None

    def _mark(self, answer: str) -> float:
        """The score of an answer: of its last number, since some models reason first; nan outside the range."""
        found = _NUMBER.findall(answer)
        mark = float(found[-1]) if found else math.nan
        inside = self.config.low <= mark <= self.config.high
        return (mark - self.config.low) / (self.config.high - self.config.low) if inside else math.nan


def _png(image: Tensor) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(as_uint8(image)).save(stream, format="png")
    return stream.getvalue()
