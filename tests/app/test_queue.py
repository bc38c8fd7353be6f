"""Hints: to a real broker, and to none."""

from __future__ import annotations

import json
import time

import redis

from app.queue import Queue


def test_a_hint_carries_an_id_and_nothing_else(broker: str):
    queue = Queue(broker)
    queue.hint_job("ftjob-1")
    queue.hint_file("file-1")
    queue.close()
    with redis.Redis(unix_socket_path=broker.removeprefix("redis+socket://")) as connection:
        found = {name: json.loads(connection.lindex(name, 0)) for name in ("training", "files")}
        assert [connection.llen(name) for name in found] == [1, 1]
    assert {name: (m["headers"]["task"], m["headers"]["argsrepr"]) for name, m in found.items()} == {
        "training": ("train_job", "['ftjob-1']"),
        "files": ("process_file", "['file-1']"),
    }
    assert all(m["headers"]["eta"] is m["headers"]["expires"] is None for m in found.values())


def test_a_broker_that_is_away_is_no_error_and_no_wait():
    queue = Queue("redis+socket:///nonexistent/valkey.sock")
    queue.hint_job("ftjob-0")  # imports the transport
    began = time.monotonic()
    for number in range(5):
        queue.hint_job(f"ftjob-{number}")
    assert time.monotonic() - began < 2.0
    queue.close()
