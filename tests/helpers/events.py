"""Reads the event files that TensorBoard reads, and checks their checksums."""

import struct

from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c


def read_events(logdir):
    """Returns every event of every file in a folder, oldest first."""
    events = []
    for path in logdir.iterdir():
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack('<Q', data[:8])
            record = data[12:12 + length]
            assert struct.unpack('<II', data[8:12] + data[12 + length:16 + length]) == (
                masked_crc32c(data[:8]), masked_crc32c(record))
            events.append(event_pb2.Event.FromString(record))
            data = data[16 + length:]
    return sorted(events, key=lambda event: event.wall_time)


def scalars_of(events):
    """Returns step, name and value of every scalar."""
    return [(event.step, value.tag, value.simple_value) for event in events for value in event.summary.value]
