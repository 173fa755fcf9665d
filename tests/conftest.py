"""Fresh random inputs in every run, which can be drawn again: XLROUTE_TEST_SEED=N pytest ..."""

from __future__ import annotations

import logging
import os
import random
import secrets
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# Triton's interpreter runs the kernels where there is no GPU; read when a kernel's module is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from xlroute import RoutedTransformerXL

# In the environment, for the processes that pytest-xdist starts.
SEED = int(os.environ.setdefault("XLROUTE_TEST_SEED", str(random.SystemRandom().randrange(10**6))))


def pytest_report_header() -> str:
    return f"XLROUTE_TEST_SEED={SEED}"


# What `build_model` takes to route tokens, in small windows that no segment is a multiple of.
ROUTED: dict[str, dict[str, Any]] = {
    "attention": {
        "routed_self_attention": True,
        "num_heavy_attn_tokens_q": 2,
        "num_heavy_attn_tokens_kv": 2,
        "routing_window": 3,
    },
    "feedforward": {"routed_feedforward": True, "num_heavy_ff_tokens": 0.5, "routing_window": 3},
    "queries": {"num_tokens_q": 1, "routing_window": 3},
}
ROUTED["all"] = {name: value for options in ROUTED.values() for name, value in options.items()}


@pytest.fixture(params=ROUTED)
def routed(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of a model that routes tokens in one way, and in all."""
    return ROUTED[request.param]


@pytest.fixture(scope="session")
def routed_all() -> dict[str, Any]:
    """Options of a model that routes tokens in every way."""
    return ROUTED["all"]


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    seed = SEED + zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    random.seed(seed)


@pytest.fixture
def test_seed() -> int:
    """A seed for a process that a test starts."""
    return random.randrange(10**6)


@pytest.fixture
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """What users have: Triton takes tensors on a GPU alone."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(scope="session")
def build_model() -> Callable[..., RoutedTransformerXL]:
    """Builds small models in evaluation mode whose memory matters: gates open, weights large."""

    def build(dtype: torch.dtype = torch.float64, **options: Any) -> RoutedTransformerXL:
        small: dict[str, Any] = {
            "vocab_size": 50,
            "dim": 16,
            "depth": 3,
            "heads": 4,
            "dim_head": 4,
            "mem_len": 6,
            "memory_layers": (2, 3),
            "num_tokens_kv": 3,
            "kv_routing_tokens": 2,
            "segment_len": 5,
            "memory_routing": "learned",
        }
        model = RoutedTransformerXL(**{**small, **options}).to(dtype).eval()
        for name, parameter in model.named_parameters():
            if "memory_gate" in name:
                torch.nn.init.constant_(parameter, 1.0)
            elif "null_logit" in name:
                torch.nn.init.zeros_(parameter)
            elif parameter.ndim >= 2:
                torch.nn.init.normal_(parameter, std=0.3)
        return model

    return build


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The url of a local S3 server, which forgets everything at the end."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The url of a new bucket, s3://..., on the local server."""
    for name, value in (
        ("ENDPOINT_URL", s3_server),
        ("ACCESS_KEY_ID", "test"),
        ("SECRET_ACCESS_KEY", "test"),
        ("REGION", "us-east-1"),
        ("ALLOW_HTTP", "true"),
    ):
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = f"bucket-{secrets.token_hex(4)}"
    urllib.request.urlopen(urllib.request.Request(f"{s3_server}/{bucket}", method="PUT")).close()
    return f"s3://{bucket}"


@pytest.fixture
def quick_bucket(monkeypatch: pytest.MonkeyPatch) -> str:
    """The url of a new bucket in this process: for what takes too many requests to ask a server."""
    from obstore.store import MemoryStore

    store = MemoryStore()
    monkeypatch.setattr("xlroute.memory.s3._open_bucket", lambda name: store)
    return "s3://quick"
