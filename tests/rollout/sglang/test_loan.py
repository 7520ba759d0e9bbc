"""Memory lent and taken back, by a server that ends, as SGLang does, when it is to take back what it has not given."""

from __future__ import annotations

import threading
from typing import Any

from megatron_vcr1.rollout.sglang.http import weights_of
from megatron_vcr1.rollout.sglang.loan import LENT, MemoryLoan
from tests.rollout.sglang.fake_server import FakeServer, Reply


class Lender:
    """What a server does about its memory; it ends where SGLang's scheduler would raise."""

    def __init__(self, release: Reply = (200, None)) -> None:
        self.version = "3@run"
        self.is_lent = self.is_paused = self.has_ended = False
        self.release = release
        self.may_release, self.has_released = threading.Event(), threading.Event()
        self.may_release.set()

    def __call__(self, path: str, body: Any) -> Reply:
        if path == "/pause_generation":
            self.is_paused = True
        elif path == "/continue_generation":
            self.is_paused = False
        elif path == "/update_weight_version":
            self.version = body["new_version"]
        elif path == "/release_memory_occupation":
            self.has_ended |= self.is_lent or not self.is_paused
            self.may_release.wait(60)
            self.is_lent = self.release[0] == 200
            self.has_released.set()
            return self.release
        elif path == "/resume_memory_occupation":
            self.has_ended |= not self.is_lent
            self.is_lent = False
        return (500, {}) if self.has_ended else (200, {"weight_version": self.version, "tp_size": 1})


def loan_of(server: FakeServer, timeout_s: float = 30) -> MemoryLoan:
    return MemoryLoan([server.url], None, timeout_s=timeout_s)


def test_lent_memory_comes_back_with_the_weights_version() -> None:
    lender = Lender()
    with FakeServer(lender) as server:
        loan = loan_of(server)
        loan.take_back()  # never lent
        loan.lend()
        loan.lend()
        assert lender.is_lent and weights_of(server.url) == f"{LENT}3@run"
        loan.take_back()
        loan.take_back()
        assert (lender.is_lent, lender.is_paused, lender.has_ended) == (False, False, False)
        assert weights_of(server.url) == "3@run"


def test_servers_copy_their_weights_at_the_same_time() -> None:
    both = threading.Barrier(2)

    class Slow(Lender):
        def __call__(self, path: str, body: Any) -> Reply:
            if path in ("/release_memory_occupation", "/resume_memory_occupation"):
                both.wait(30)
            return super().__call__(path, body)

    first, second = Slow(), Slow()
    with FakeServer(first) as one, FakeServer(second) as other:
        loan = MemoryLoan([one.url, other.url], None, timeout_s=60)
        loan.lend()
        assert first.is_lent and second.is_lent
        loan.take_back()
        assert not (first.is_lent or second.is_lent)


def test_memory_that_was_released_after_the_time_out_is_taken_back() -> None:
    lender = Lender()
    lender.may_release.clear()
    with FakeServer(lender) as server:
        loan = loan_of(server, timeout_s=2)
        loan.lend()
        lender.may_release.set()
        assert lender.has_released.wait(60)
        loan.take_back()
        assert (lender.is_lent, lender.is_paused, lender.version) == (False, False, "3@run")


def test_a_server_that_keeps_its_memory_goes_on() -> None:
    lender = Lender(release=(400, {"message": "not idle"}))
    with FakeServer(lender) as server:
        loan = loan_of(server)
        loan.lend()
        assert (lender.is_paused, lender.version) == (False, "3@run")
        loan.take_back()
        assert not lender.has_ended


def test_a_server_that_was_started_anew_meanwhile_has_nothing_to_take_back() -> None:
    lender = Lender()
    with FakeServer(lender) as server:
        loan = loan_of(server)
        loan.lend()
        lender.version, lender.is_lent, lender.is_paused = "default", False, False
        loan.take_back()
        assert not lender.has_ended
