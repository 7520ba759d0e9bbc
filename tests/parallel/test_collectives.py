"""Results and errors of collectives on Python objects."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest

from megatron_vcr1.config.model_sections import ParallelSection
from megatron_vcr1.errors import UserError
from megatron_vcr1.parallel import collectives, mesh
from tests.gloo import GlooPool

pytestmark = pytest.mark.xdist_group("gloo")


class _Unpicklable(RuntimeError):
    def __init__(self, server: str, reason: str) -> None:
        super().__init__(f"{server}: {reason}")


def _error(kind: str) -> tuple[str, str]:
    mesh.initialize(ParallelSection(tensor=2))

    def fail() -> None:
        raise UserError("no videos") if kind == "user" else _Unpicklable("gpu3", "gone")

    try:
        collectives.broadcast_within_replica(fail)
    except Exception as error:
        return type(error).__name__, str(error)
    raise AssertionError("the error did not reach this rank")


@pytest.mark.parametrize(
    "kind, first, others",
    [
        ("user", ("UserError", "no videos"), ("UserError", "no videos")),
        ("unpicklable", ("_Unpicklable", "gpu3: gone"), ("RuntimeError", "_Unpicklable: gpu3: gone")),
    ],
)
def test_all_ranks_of_a_replica_raise_the_leaders_error(
    gloo_pool: GlooPool, kind: str, first: tuple[str, str], others: tuple[str, str]
) -> None:
    assert gloo_pool.run(_error, kind) == [first, others, first, others]


def _results() -> tuple[list[int], list[int], list[float], int]:
    mesh.initialize(ParallelSection(tensor=2))
    rank = mesh.rank()
    return (
        collectives.gather_objects(rank),
        collectives.run_on_every_rank(lambda: 10 * rank),
        collectives.sum_over_ranks([rank, 0.5]),
        collectives.broadcast_within_replica(lambda: rank),
    )


def test_every_rank_gets_the_results(gloo_pool: GlooPool) -> None:
    for rank, results in enumerate(gloo_pool.run(_results)):
        assert results == ([0, 1, 2, 3], [0, 10, 20, 30], [6.0, 2.0], rank // 2 * 2)


def _failure_on_rank_2() -> str:
    mesh.initialize(ParallelSection())

    def work() -> int:
        if mesh.rank() == 2:
            raise UserError("disk full")
        return mesh.rank()

    with pytest.raises(UserError) as caught:
        collectives.run_on_every_rank(work)
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def test_a_failure_on_one_rank_is_raised_on_all(gloo_pool: GlooPool) -> None:
    with_note = "disk full\nraised on rank 2 and sent to all ranks"
    assert gloo_pool.run(_failure_on_rank_2) == [with_note, with_note, "disk full", with_note]


def _first_rank_only() -> int:
    mesh.initialize(ParallelSection())
    return collectives.run_on_first_rank(lambda: 7 + mesh.rank())


def test_run_on_first_rank_returns_its_result_everywhere(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(_first_rank_only) == [7, 7, 7, 7]


FAILURES: dict[str, Callable[[], Exception]] = {
    "user": lambda: UserError("no such model"),
    "disk": lambda: OSError(errno.ENOSPC, "No space left on device"),
    "built-in": lambda: KeyError("a tensor"),
    "not picklable": lambda: _Unpicklable("gpu3", "gone"),
}


def _errors_of_failing_ranks() -> list[tuple[str, str]]:
    """Let ranks 1 and 3 fail in each way; return the errors that are raised on this rank."""
    mesh.initialize(ParallelSection())
    caught = []
    for failure in FAILURES.values():

        def work(failure: Callable[[], Exception] = failure) -> None:
            if mesh.rank() == 1:
                raise failure()
            if mesh.rank() == 3:
                raise ValueError("later")

        try:
            collectives.run_on_every_rank(work)
        except Exception as error:
            caught.append((type(error).__name__, str(error)))
    return caught


def test_the_error_of_the_lowest_failing_rank_is_raised_on_all(gloo_pool: GlooPool) -> None:
    errors = gloo_pool.run(_errors_of_failing_ranks)
    expected = [
        ("UserError", "no such model"),
        ("OSError", "[Errno 28] No space left on device"),
        ("KeyError", "'a tensor'"),
    ]
    assert [error[:3] for error in errors] == [expected] * 4
    assert errors[1][3] == ("_Unpicklable", "gpu3: gone")
    assert [errors[other][3] for other in (0, 2, 3)] == [("RuntimeError", "_Unpicklable: gpu3: gone")] * 3


def test_a_process_without_torch_distributed_is_the_only_rank() -> None:
    assert collectives.run_on_every_rank(lambda: "result") == ["result"]
    assert collectives.run_on_first_rank(lambda: "result") == "result"

    def fail() -> None:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        collectives.run_on_first_rank(fail)
