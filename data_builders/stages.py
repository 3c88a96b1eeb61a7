"""What a builder is made of: records, and stages that map an iterator of records to another.

A builder is a list of stages between a source and a sink, read from top to bottom. Nothing runs before the
sink asks for a record, so a list of stages holds no more than its stages hold. A record that is dropped is
not lost: it carries its reason to the sink, later stages pass it on untouched, and the counts of all reasons
are counts over what was written.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby, islice
from typing import Any

from tqdm import tqdm

Record = dict[str, Any]
Stage = Callable[[Iterable[Record]], Iterator[Record]]

REASON = "reject_reason"


def flow(source: Iterable[Record], stages: Iterable[Stage]) -> Iterator[Record]:
    """The records of the source after all stages."""
    records = iter(source)
    for stage in stages:
        records = stage(records)
    return records


def drop(record: Record, reason: str) -> Record:
    """The record with the reason why it is used for nothing."""
    return record | {REASON: reason}


def kept(record: Record) -> bool:
    """Whether no stage has dropped the record."""
    return not record.get(REASON)


def batched(records: Iterable[Record], size: int) -> Iterator[list[Record]]:
    """Consecutive records in lists of `size`, the last one shorter."""
    records = iter(records)
    while batch := list(islice(records, size)):
        yield batch


def by_prompt(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Consecutive records of the same prompt, one list a prompt."""
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


def watched(bar: tqdm) -> Stage:
    """The stage that counts the records passing by on a progress bar."""

    def stage(records: Iterable[Record]) -> Iterator[Record]:
        for record in records:
            bar.update()
            yield record

    return stage
