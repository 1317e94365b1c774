"""Copies through a few buffers, with a thread in the place of the bus: order, reuse, and what becomes of errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lox_merge.errors import LoxMergeWarning
from lox_merge.jobs.device_memory import MARGIN_BYTES, is_out_of_memory, make_room, on_cpu_where_too_large, within_margin
from lox_merge.jobs.transfers import HostLane, Mark, Transfers, mark_here

CPU = torch.device("cpu")


class SlowLane(HostLane):
    """A bus that stands still until it is let go, and knows what was copied meanwhile."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.open, self.asked, self.done, self._fail_at = threading.Event(), 0, 0, fail_at

    def copy(self, source: Tensor, target: Tensor) -> Mark:
        number, self.asked = self.asked, self.asked + 1
        lane = self

        def copied() -> None:
            assert lane.open.wait(10)
            if number == lane._fail_at:
                raise RuntimeError("the bus is broken")
            target.copy_(source)
            lane.done += 1

        from lox_merge.jobs.transfers import _Copied

        return _Copied(self._pool.submit(copied))


@pytest.fixture(name="transfers")
def fixture() -> Iterator[Transfers]:
    transfers = Transfers(CPU, buffers=2, size=1000)
    yield transfers
    transfers.close()


def matrices(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """Whole and part of one, several pieces each, a single row larger than a buffer, an empty one."""
    generator = torch.Generator().manual_seed(0)
    large = torch.randn(60, 44, generator=generator).to(dtype)
    row = torch.randn(1, 3000, generator=generator).to(dtype)
    return [large, large[::2], large[:, 10:21], row, large[:0], torch.randn(50, 1, generator=generator).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_there_and_back_is_the_same(transfers: Transfers, dtype: torch.dtype) -> None:
    sources = matrices(dtype)
    device = [torch.zeros(matrix.shape, dtype=dtype) for matrix in sources]
    transfers.upload(zip(sources, device, strict=True)).wait()
    for one, other in zip(sources, device, strict=True):
        assert torch.equal(one, other)
    back = [torch.zeros(60, 44, dtype=dtype), torch.zeros(60, 44, dtype=dtype)]
    targets = [back[0], back[1][::2]]  # into a part of a tensor, too
    transfers.download(zip(device[:2], targets, strict=True), after=mark_here(CPU))
    assert torch.equal(back[0], sources[0])
    assert torch.equal(back[1][::2], sources[1]) and not back[1][1::2].any()


def test_a_buffer_is_not_filled_again_before_it_was_taken() -> None:
    lane = SlowLane()
    transfers = Transfers(CPU, buffers=2, size=400, lane=lane)
    source, target = torch.arange(1000.0).view(10, 100), torch.zeros(10, 100)
    marks: list[Mark] = []
    reader = threading.Thread(target=lambda: marks.append(transfers.upload([(source, target)])))
    reader.start()
    reader.join(0.3)
    assert reader.is_alive() and lane.asked == 2  # both buffers wait for the bus
    lane.open.set()
    reader.join(10)
    marks[0].wait()
    assert torch.equal(source, target) and lane.asked == lane.done == 10
    transfers.close()


def test_reading_goes_on_while_the_bus_is_busy() -> None:
    lane = SlowLane()
    transfers = Transfers(CPU, buffers=3, size=400, lane=lane)
    source, target = torch.arange(300.0).view(3, 100), torch.zeros(3, 100)
    mark = transfers.upload([(source, target)])  # returns with all of it in buffers
    assert lane.done == 0
    lane.open.set()
    mark.order()
    assert torch.equal(source, target)
    transfers.close()


class Unreadable(RuntimeError):
    pass


def test_an_error_of_the_reader_is_raised_and_the_next_upload_works(transfers: Transfers) -> None:
    good, target = torch.ones(40, 25), torch.zeros(40, 25)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        yield good, target
        raise Unreadable("the file is gone")

    with pytest.raises(Unreadable):
        transfers.upload(pairs())
    assert torch.equal(target, good)  # what was on its way has arrived
    again = torch.zeros(40, 25)
    transfers.upload([(2 * good, again)]).wait()
    assert torch.equal(again, 2 * good)


@pytest.mark.parametrize("way", ["up", "down"])
def test_an_error_of_the_bus_is_raised_once(way: str) -> None:
    lane = SlowLane(fail_at=1)
    lane.open.set()
    transfers = Transfers(CPU, buffers=2, size=400, lane=lane)
    source, target = torch.arange(1000.0).view(10, 100), torch.zeros(10, 100)
    with pytest.raises(RuntimeError, match="bus is broken"):
        if way == "up":
            transfers.upload([(source, target)]).wait()
        else:
            transfers.download([(source, target)], after=mark_here(CPU))
    other = torch.zeros(10, 100)
    transfers.upload([(source, other)]).wait()
    assert torch.equal(source, other)
    transfers.close()


def test_a_download_waits_for_the_device() -> None:
    lane, computed = HostLane(), threading.Event()
    transfers = Transfers(CPU, lane=lane)
    source, target = torch.zeros(4, 4), torch.zeros(4, 4)

    class Computed:
        def wait(self) -> None:
            assert computed.wait(10)

        order = wait

    fetcher = threading.Thread(target=lambda: transfers.download([(source, target)], after=Computed()))
    fetcher.start()
    fetcher.join(0.1)
    assert fetcher.is_alive()
    source.fill_(3)
    computed.set()
    fetcher.join(10)
    assert (target == 3).all()
    transfers.close()


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling")])
def test_what_a_device_has_no_room_for_is_done_on_the_cpu(error: RuntimeError) -> None:
    def work(device: torch.device) -> str:
        if device.type == "meta":
            raise error
        return device.type

    with pytest.warns(LoxMergeWarning, match=r"w \(\[3, 4\]\) did not fit on meta; it was edited on the CPU"):
        assert on_cpu_where_too_large(work, torch.device("meta"), "w ([3, 4])", "edited") == "cpu"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        on_cpu_where_too_large(lambda device: bad(device), torch.device("meta"), "w", "edited")


def bad(device: torch.device) -> None:
    raise RuntimeError(f"CUDA error: an illegal memory access was encountered on {device}")


def test_room_is_made_by_forgetting_what_an_attempt_held() -> None:
    import weakref

    held: list[weakref.ref[Tensor]] = []

    def attempt() -> None:
        tensor = torch.ones(1000)
        held.append(weakref.ref(tensor))
        try:
            raise KeyError("first")
        except KeyError:
            raise torch.OutOfMemoryError("no room") from None

    try:
        attempt()
    except torch.OutOfMemoryError as error:
        assert held[0]() is not None
        make_room(error, CPU)
        assert held[0]() is None


def test_a_margin_is_left() -> None:
    assert within_margin(80 * 2**30) == (72 * 2**30) - MARGIN_BYTES
    assert within_margin(2**29) == 0
