"""Weights on the hub, before a job needs them: in the cache, to be had from a server, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from launch import hub
from nsi.errors import UserError

VIT = "vit_tiny_patch16_224"
REPOSITORY = "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k"
ANSWERS = {
    200: {"Content-Length": "5"},
    429: {},
    503: {},
    404: {"X-Error-Code": "EntryNotFound"},
    401: {"X-Error-Code": "GatedRepo"},
}


def fill_cache(folder: Path, content: bytes = b"12345", name: str = "model.safetensors") -> None:
    """As the hub's client leaves it."""
    place = folder / f"models--{REPOSITORY.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc")
    (place / "snapshots" / "abc").mkdir(parents=True)
    (place / "snapshots" / "abc" / name).write_bytes(content)


@contextmanager
def hub_that_answers(status: int) -> Iterator[tuple[str, list[str]]]:
    """A server's address, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            for name, value in {"ETag": '"e"', "X-Repo-Commit": "abc", **ANSWERS[status]}.items():
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def ask_at(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty one, and a hub that cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    ask_at(monkeypatch, "http://127.0.0.1:9")
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_in_the_cache(cache: Path, name: str) -> None:
    fill_cache(cache, name=name)
    assert hub.weights_bytes(VIT) == 5


@pytest.mark.parametrize("status", [200, 404, 429, 503])
def test_a_hub_that_answers(monkeypatch: pytest.MonkeyPatch, status: int) -> None:
    """Nothing is fetched. 404: it has the weights in the older form, which timm finds; 429: too many ask just now."""
    with hub_that_answers(status) as (endpoint, asked):
        ask_at(monkeypatch, endpoint)
        assert hub.weights_bytes(VIT) == 0
    assert asked == [f"/{REPOSITORY}/resolve/main/model.safetensors"]


def test_a_hub_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with hub_that_answers(401) as (endpoint, _):
        ask_at(monkeypatch, endpoint)
        with pytest.raises(UserError, match=r"and the hub gives none \(401 Client Error"):
            hub.weights_bytes(VIT)


def test_a_hub_out_of_reach(cache: Path) -> None:
    with pytest.raises(UserError) as error:
        hub.weights_bytes(VIT)
    text = str(error.value)
    assert text.startswith(f"--backbone {VIT}: its weights are not in {cache}, and the hub gives none (")
    assert f"timm.create_model('{VIT}', pretrained=True)" in text
    assert "\n" not in text


def test_what_needs_no_weights() -> None:
    assert hub.weights_bytes("dct") == 0


@pytest.mark.parametrize("name", ["no_such_model", "vit_tiny_patch16_224.no_such_tag"])
def test_what_timm_does_not_know(name: str) -> None:
    with pytest.raises(UserError, match=f"--backbone {name}: timm .* knows no such model"):
        hub.weights_bytes(name)
