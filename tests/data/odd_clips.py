"""Clips of kinds that PyAV does not write: made of the packets of other clips, or by editing their bytes."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av

from tests.data.video_clips import RATE, SIDE, write_clip

_VOP = b"\x00\x00\x01\xb6"
_EMPTY_VOP = _VOP + b"\x50\x00\x7f"


def write_vfw_matroska(path: Path) -> Path:
    """Write H.264 with B-frames as Matroska in its Video for Windows mode, where time stamps are those of decoding."""
    source = write_clip(path.with_suffix(".h264"), options={"bf": "2"})
    template = write_clip(path.with_suffix(".avi"), codec="mpeg4", num_frames=2)
    with av.open(str(source)) as old, av.open(str(template)) as other, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(other.streams.video[0])
        extra = old.streams.video[0].codec_context.extradata or b""
        header = struct.pack("<IiiHH4sIiiII", 40 + len(extra), SIDE, SIDE, 1, 24, b"H264", SIDE * SIDE * 3, 0, 0, 0, 0)
        stream.codec_context.extradata = header + extra
        for number, old_packet in enumerate(packet for packet in old.demux(video=0) if packet.size):
            packet = av.Packet(bytes(old_packet))
            packet.pts = packet.dts = number * 1000 // RATE
            packet.time_base, packet.is_keyframe, packet.stream = Fraction(1, 1000), old_packet.is_keyframe, stream
            new.mux(packet)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"V_MPEG4/ISO/ASP", b"V_MS/VFW/FOURCC"))
    return path


def write_packed_bitstream(path: Path) -> Path:
    """Write MPEG-4 as DivX does: a B-frame is in the packet of the frame before it, and an empty packet follows."""
    source = write_clip(path.with_name("plain.avi"), codec="mpeg4", options={"bf": "1"})
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        contents = [bytes(packet) for packet in old.demux(video=0) if packet.size]
        kinds = ["IPBS"[content[content.index(_VOP) + 4] >> 6] for content in contents]
        first = contents[0].index(_VOP)
        contents[0] = contents[0][:first] + b"\x00\x00\x01\xb2DivX503b1393p" + contents[0][first:]
        for number, content in enumerate(contents):
            if kinds[number] == "B":
                content = _EMPTY_VOP
            elif kinds[number + 1 : number + 2] == ["B"]:
                content += contents[number + 1]
            packet = av.Packet(content)
            packet.dts, packet.duration, packet.time_base = number, 1, Fraction(1, RATE)
            packet.is_keyframe, packet.stream = kinds[number] == "I", stream
            new.mux(packet)
    return path


def set_edit_list(path: Path, edits: Sequence[tuple[float, float]]) -> Path:
    """Give an MP4 of `write_clip` another edit list: duration and start of each part, in seconds of the media."""
    content = bytearray(path.read_bytes())
    movie_scale, media_scale = (_time_scale(content, box) for box in (b"mvhd", b"mdhd"))
    entries = [(round(duration * movie_scale), round(start * media_scale), 1, 0) for duration, start in edits]
    body = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiHH", *entry) for entry in entries)
    box = struct.pack(">I4sI4s", len(body) + 16, b"edts", len(body) + 8, b"elst") + body
    start = content.index(b"edts") - 4
    (old_size,) = struct.unpack_from(">I", content, start)
    content[start : start + old_size] = box  # the boxes that hold it are after the data, so no offset changes
    for parent in (b"trak", b"moov"):
        at = content.index(parent) - 4
        struct.pack_into(">I", content, at, struct.unpack_from(">I", content, at)[0] + len(box) - old_size)
    path.write_bytes(content)
    return path


def _time_scale(content: bytearray, box: bytes) -> int:
    (scale,) = struct.unpack_from(">I", content, content.index(box) + 16)
    return scale
