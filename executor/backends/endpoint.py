"""Any OpenAI-compatible server that runs already: trtllm-serve, Dynamo, vLLM, SGLang, ...

What such a server understands differs: token ids as prompts, running token counts, `ignore_eos`.
The most exact way that it answers is found by asking, before anything is measured.
"""

from __future__ import annotations

import http.client
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

from cost_models.errors import ConfigError
from executor.backend import (
    Availability,
    Failure,
    Launch,
    Server,
    ServerFailedError,
    ServingBackend,
)
from executor.load_generator import HTTP_OK, Endpoint, Prompt
from executor.process import http_connection, http_get

KEY_VARIABLE = "PLANNER_API_KEY"
"""Environment variable with the key of a server that asks for one."""

OPTION_SETS: Sequence[Mapping[str, Any]] = (
    {
        "ignore_eos": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    },
    {"ignore_eos": True, "stream_options": {"include_usage": True}},
    {"ignore_eos": True},
    {},
)
"""From the most exact to the most portable; the first that a server takes is used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEndpoint(Endpoint):
    """A server that takes text alone: one short word stands for about one token."""

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the request's JSON with the prompt as text."""
        text = {"prompt": words(prompt.token_ids)}
        return {**super(TextEndpoint, self).body(prompt), **text}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatEndpoint(Endpoint):
    """A server that takes chat messages alone."""

    path: str = "/v1/chat/completions"

    def body(self, prompt: Prompt) -> dict[str, Any]:
        """Return the request's JSON with the prompt as the user's message."""
        body = super(ChatEndpoint, self).body(prompt)
        del body["prompt"]
        return {**body, "messages": [{"role": "user", "content": words(prompt.token_ids)}]}


class RemoteServer(Server):
    """A server that somebody else started, and will stop."""

    def __init__(self, endpoint: Endpoint, notes: tuple[str, ...]) -> None:
        self.endpoint = endpoint
        self.notes = notes
        self.command = f"{endpoint.origin}{endpoint.path}"

    def stop(self) -> None:
        """Leave it as it is."""


class EndpointBackend(ServingBackend):
    """Measures a server by its URL; option `url`, and `model` where it serves several."""

    name = "endpoint"
    engine = "endpoint"
    uses_gpu = False

    def availability(self) -> Availability:
        """It needs nothing but the server."""
        return Availability(can_run=True)

    def start(self, deployment: Launch, *, limit_s: float) -> Server:
        """Find out how the server wants to be asked."""
        base = base_endpoint(deployment.options.get("url", ""))
        model = deployment.options.get("model") or served_model(base, limit_s)
        answers = []
        for endpoint, notes in _ways(replace(base, model=model)):
            status, text = ask(endpoint, limit_s=limit_s)
            if status == HTTP_OK:
                return RemoteServer(endpoint, notes)
            answers.append(f"{endpoint.path}: HTTP {status} {text[:200]}")
        raise ServerFailedError(
            f"{deployment.options['url']} takes no completions",
            kind=Failure.NOT_AVAILABLE,
            log_tail="\n".join(answers),
        )


DEFAULT_PORTS = {"http": 80, "https": 443}
"""Schemes that are measured."""


def base_endpoint(url: str) -> Endpoint:
    """Return where a URL points to.

    Raises:
        ConfigError: No URL, or of another scheme.
    """
    parts = urlsplit(url)
    if parts.scheme not in DEFAULT_PORTS or not parts.hostname:
        raise ConfigError(
            f"url {url!r}: not http://HOST:PORT or https://HOST:PORT",
            hint="give --option url=http://HOST:PORT",
        )
    key = os.environ.get(KEY_VARIABLE, "")
    return Endpoint(
        host=parts.hostname,
        port=parts.port or DEFAULT_PORTS[parts.scheme],
        tls=parts.scheme == "https",
        path=f"{parts.path.rstrip('/').removesuffix('/v1')}/v1/completions",
        model="",
        headers={"Authorization": f"Bearer {key}"} if key else {},
    )


def served_model(endpoint: Endpoint, limit_s: float) -> str:
    """Return the id of the one model that a server has.

    Raises:
        ServerFailedError: It does not answer, or serves none or several.
    """
    path = endpoint.path.replace("/completions", "/models")
    status, text = http_get(
        host=endpoint.host,
        port=endpoint.port,
        tls=endpoint.tls,
        path=path,
        limit_s=limit_s,
        headers=endpoint.headers,
    )
    try:
        names = [str(entry["id"]) for entry in json.loads(text)["data"]]
    except (ValueError, KeyError, TypeError):
        names = []
    if len(names) == 1:
        return names[0]
    where = f"{endpoint.origin}{path}"
    answer = f"HTTP status {status}" if status else text
    problem = f"serves {', '.join(names)}" if names else answer
    raise ServerFailedError(
        f"{where}: {problem}", kind=Failure.NOT_AVAILABLE, hint="give --option model=NAME"
    )


def ask(endpoint: Endpoint, *, limit_s: float) -> tuple[int, str]:
    """Send one short request and return status and text; 0 where nothing answers."""
    connection = http_connection(endpoint.host, endpoint.port, tls=endpoint.tls, limit_s=limit_s)
    body = json.dumps(endpoint.body(Prompt(token_ids=(10, 11, 12), osl=2)))
    headers = {"Content-Type": "application/json", **endpoint.headers}
    try:
        connection.request("POST", endpoint.path, body, headers)
        reply = connection.getresponse()
        text = reply.read().decode("utf-8", "replace")
    except (OSError, http.client.HTTPException) as error:
        return 0, str(error)
    finally:
        connection.close()
    refused = '"error"' in text and '"choices"' not in text
    return (0 if refused else reply.status), text


def words(token_ids: Sequence[int]) -> str:
    """Return a text of about as many tokens, different for different token ids."""
    return " ".join(_WORDS[token % len(_WORDS)] for token in token_ids)


_WORDS = (
    "the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are",
    "as", "with", "his", "they", "at", "be", "this", "have", "from", "or", "one", "had", "by",
    "word", "but", "not", "what", "all",
)  # fmt: skip
"""Short words, each one token in every common vocabulary."""


def _ways(base: Endpoint) -> Iterator[tuple[Endpoint, tuple[str, ...]]]:
    """Yield how a server may be asked, the most exact first."""
    chat = base.path.replace("/completions", "/chat/completions")
    same: dict[str, Any] = {
        "host": base.host,
        "port": base.port,
        "tls": base.tls,
        "model": base.model,
        "headers": base.headers,
        "exact_lengths": False,
    }
    for options in OPTION_SETS:
        notes = () if "ignore_eos" in options else (_ENDS_ITSELF,)
        exact = not notes
        yield replace(base, options=options, exact_lengths=exact), notes
    for options in OPTION_SETS:
        yield TextEndpoint(path=base.path, options=options, **same), (_TEXT,)
        yield ChatEndpoint(path=chat, options=options, **same), (_TEXT, _CHAT)


_ENDS_ITSELF = "output lengths are approximate: the server takes no ignore_eos"
_TEXT = "lengths are approximate: the server takes text, not token ids"
_CHAT = "the server takes chat messages only: its template adds tokens to each prompt"
