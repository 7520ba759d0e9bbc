"""Clips of kinds that PyAV does not write: made of the packets of other clips, or by editing their bytes."""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from tests.data.video_clips import RATE, SIDE, draw, write_clip

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


def write_field_coded(path: Path, *, is_split: bool, num_frames: int = 20) -> Path:
    """Write interlaced H.264 whose two fields are pictures of their own (PAFF); the pixels are stored uncompressed.

    Args:
        path: video to write; a raw stream if its suffix is .h264.
        is_split: whether each field is a packet of its own, with its own time stamp; otherwise each frame is.
        num_frames: number of frames.
    """
    fields = [[_field(number, is_bottom) for is_bottom in (False, True)] for number in range(num_frames)]
    raw = path.with_suffix(".h264")
    raw.write_bytes(b"".join(field for frame in fields for field in frame))
    if path == raw:
        return path
    with av.open(str(raw)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [field for frame in fields for field in frame] if is_split else [top + end for top, end in fields]
        for number, content in enumerate(packets):
            packet = av.Packet(content)
            packet.duration, packet.time_base = (1, Fraction(1, RATE * (1 + is_split)))
            packet.pts = packet.dts = number
            packet.is_keyframe, packet.stream = number == 0, stream
            new.mux(packet)
    return path


def _field(number: int, is_bottom: bool) -> bytes:
    """Return a field as an I slice whose macroblocks hold their pixels (I_PCM); the first one follows the headers."""
    is_idr = number == 0 and not is_bottom
    grey = np.full((SIDE + 16, SIDE), 60, dtype=np.uint8)  # whole macroblocks; the headers cut it to SIDE
    grey[:SIDE] = draw(number)[..., 0]
    # first_mb, slice_type, pic_parameter_set, frame_num, field_pic, bottom_field
    bits = _ue(0) + _ue(7) + _ue(0) + f"{number % 16:04b}" + "1" + f"{is_bottom:b}"
    bits += (_ue(0) if is_idr else "") + f"{2 * number + is_bottom:08b}" + ("00" if is_idr else "0") + _ue(0)
    for row in range(0, (SIDE + 16) // 2, 16):
        for column in range(0, SIDE, 16):
            pixels = grey[is_bottom::2][row : row + 16, column : column + 16].tobytes() + b"\x80" * 128
            bits += _ue(25)
            bits += "0" * (-len(bits) % 8) + "".join(f"{value:08b}" for value in pixels)
    headers = _nal(0x67, _sequence_header()) + _nal(0x68, _ue(0) * 2 + "00" + _ue(0) * 3 + "000" + _ue(0) * 3 + "000")
    return b"\0\0\0\1\x09\x10" + headers * is_idr + _nal(0x65 if is_idr else 0x21, bits)


def _sequence_header() -> str:
    """Return the bits of a sequence parameter set: Main profile, interlaced, SIDE x SIDE pixels, RATE frames/s."""
    size = _ue(SIDE // 16 - 1) + _ue((SIDE + 16) // 32 - 1) + "0011" + _ue(0) * 3 + _ue(4)  # 4 units of 4 rows cut
    timing = "1" + "0000" + "1" + f"{1:032b}{2 * RATE:032b}" + "1" + "0000"
    return f"{77:08b}{0:08b}{30:08b}" + _ue(0) * 3 + _ue(4) + _ue(2) + "0" + size + timing


def _ue(value: int) -> str:
    """Return the bits of an unsigned Exp-Golomb number."""
    bits = f"{value + 1:b}"
    return "0" * (len(bits) - 1) + bits


def _nal(header: int, bits: str) -> bytes:
    """Return a NAL unit. A byte of 3 is inserted where two zeros would make the next bytes a start code."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    content = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return b"\0\0\0\1" + bytes([header]) + re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", content)


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
