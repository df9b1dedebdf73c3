"""Record streams of the shards of one run, and the equal stream of a single process."""

from __future__ import annotations

import dataclasses

import numpy as np

from grutrace.distributed import Shard
from grutrace.records import AnnotationRecord, CallRecord, WeightsRecord
from grutrace.storage.memory import MemorySink
from grutrace.storage.write.file_sink import FileSink
from tests.storage.streams import Stream, full_stream, make_header, make_module

RUN = "7c0d9b8e6f6a4f6e8d3b5a1c2e4f6a8b"


def full_shards():
    """Three shards: two that hold everything but differ in every number, and a short one."""
    first, second = full_stream(), full_stream()
    modules = first.header.modules
    third = Stream(make_header(*modules), seed=5)
    third.call([2, 2], module=2, tag="third")
    third.annotate(1, "tokens", ["a", "new"], module=2)
    for number, stream in enumerate((second, third), 1):
        stream.records = [_later(record, number) for record in stream.records]
    return [first, second, third]


def _later(record, number):
    """The same record with other numbers in it, of another time."""
    if isinstance(record, WeightsRecord):
        sites = {
            suffix: {name: array + number for name, array in site.items()}
            for suffix, site in record.sites.items()
        }
        return dataclasses.replace(record, sites=sites)
    if isinstance(record, AnnotationRecord):
        values = tuple(f"{v} {number}" if isinstance(v, str) else v + number for v in record.values)
        return dataclasses.replace(record, values=values)
    seen = {}

    def moved(array):
        return seen.setdefault(id(array), (array + number).astype(array.dtype))

    sites = {
        suffix: dataclasses.replace(
            site,
            rows={name: moved(array) for name, array in site.rows.items()},
            initial=moved(site.initial),
        )
        for suffix, site in record.sites.items()
    }
    # Not in the order of the ranks.
    return dataclasses.replace(record, sites=sites, time=record.time - 1000 * number)


def small_shards(count, calls=2):
    """Shards of one small module, stepwise so that sequences have several pieces."""
    streams = []
    for rank in range(count):
        stream = Stream(make_header(make_module("rnn", directions=(False,))), seed=rank)
        stream.call([1, 1], tag=f"rank {rank}")
        for _ in range(calls - 1):
            stream.call([1, 1], go_on=[0, 1])
        streams.append(stream)
    return streams


def as_one(streams):
    """The records that one process would have made, by plain loops: rank after rank."""
    modules = range(len(streams[0].header.modules))
    begun, used = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)
    records = []
    for stream in streams:
        own_begun, own_used = dict.fromkeys(modules, 0), dict.fromkeys(modules, 0)
        for record in stream.records:
            if isinstance(record, CallRecord):
                m = record.module
                own_begun[m] += len(next(iter(record.sites.values())).initial)
                own_used[m] = max(own_used[m], record.weights + 1)
        for record in stream.records:
            m = record.module
            if isinstance(record, CallRecord):
                forks = tuple(
                    dataclasses.replace(
                        fork, sequence=fork.sequence + begun[m], parent=fork.parent + begun[m]
                    )
                    for fork in record.forks
                )
                numbers = [int(number) + begun[m] for number in record.sequences]
                records.append(
                    dataclasses.replace(
                        record,
                        sequences=np.array(numbers, np.uint64),
                        weights=record.weights + used[m],
                        forks=forks,
                    )
                )
            elif isinstance(record, WeightsRecord):
                # Versions that no call used are in no trace.
                if record.version < own_used[m]:
                    records.append(dataclasses.replace(record, version=record.version + used[m]))
            else:
                records.append(dataclasses.replace(record, sequence=record.sequence + begun[m]))
        for m in modules:
            begun[m] += own_begun[m]
            used[m] += own_used[m]
    return records


def in_memory(streams):
    sinks = []
    for stream in streams:
        sink = MemorySink(stream.header)
        for record in stream.records:
            sink.append(record)
        sinks.append(sink)
    return sinks


def shard_header(stream, rank, world_size, run=RUN):
    options = stream.header.options | Shard(rank, world_size, run).options
    return dataclasses.replace(stream.header, options=options, created=1.5e9 + rank)


def write_shards(path, streams, *, world_size=None, run=RUN, ranks=None):
    """Write a shard of each stream; return their paths."""
    ranks = list(range(len(streams))) if ranks is None else ranks
    world_size = world_size or len(streams)
    paths = []
    for rank, stream in zip(ranks, streams, strict=True):
        paths.append(Shard(rank, world_size, run).path(path))
        sink = FileSink(paths[-1], shard_header(stream, rank, world_size, run))
        for record in stream.records:
            sink.append(record)
        sink.close()
    return paths


def joined_header(streams, ranks, world_size, run=RUN):
    """What the header of all together must be."""
    of = [{"rank": rank} for rank in ranks]
    shards = {"id": run, "world_size": world_size, "of": of}
    options = streams[0].header.options | {"shards": shards}
    return dataclasses.replace(streams[0].header, options=options)
