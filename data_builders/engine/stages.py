"""What a builder is made of: records, and stages that map an iterator of records to another.

A builder is a list of stages between a source and a sink, read from top to bottom. Nothing runs before the
sink asks for a record, so a list of stages holds no more than its stages hold. A record that cannot be used
is not lost: it carries its `invalid_reason` to the sink, later stages pass it on untouched, and the counts of
all reasons are counts over what was written. One that can be used and was not chosen has a
`not_selected_reason`.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any, NamedTuple

from tqdm import tqdm

Record = dict[str, Any]
Stage = Callable[[Iterable[Record]], Iterator[Record]]

INVALID, NOT_SELECTED = "invalid_reason", "not_selected_reason"


class Pair(NamedTuple):
    """Two candidates of one prompt, the better one first."""

    chosen: Record
    rejected: Record
    margin: float  # the difference of their soft scores


class Group(NamedTuple):
    """One prompt's candidates as a build decided on them."""

    candidates: list[Record]
    ranked: list[Record]  # those with a rank, the best first
    pairs: list[Pair]


def flow(source: Iterable[Record], stages: Iterable[Stage]) -> Iterator[Record]:
    """The records of the source after all stages."""
    records = iter(source)
    for stage in stages:
        records = stage(records)
    return records


def mark_invalid(record: Record, reason: str) -> Record:
    """The record with the reason why it cannot be used."""
    return record | {INVALID: reason}


def is_valid(record: Record) -> bool:
    """Whether no stage has marked the record invalid."""
    return not record.get(INVALID)


def batched(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Consecutive records in lists of `size`, the last one shorter."""
    records = iter(records)
    while batch := list(islice(records, size)):
        yield batch


def by_prompt(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Consecutive records of the same prompt, one list for each prompt."""
    for _, group in groupby(records, key=lambda record: record["prompt_id"]):
        yield list(group)


def in_threads(work: Callable[[Record], Record], *, threads: int, ahead: int) -> Stage:
    """The stage that does `work` in threads, in order, while up to `ahead` later records are made."""

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        waiting: deque[Future[Record]] = deque()
        with ThreadPoolExecutor(threads) as pool:
            for record in records:
                waiting.append(pool.submit(work, record))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    return stage


def counted(bar: tqdm) -> Stage:
    """The stage that counts records on a progress bar."""

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            bar.update()
            yield record

    return stage
