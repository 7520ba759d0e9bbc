"""Which containers and streams are read; playlists make us open nothing else."""

from __future__ import annotations

import socket
import subprocess
import sys
from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
from PIL import Image

from megatron_vcr1.data.video import VideoError, read_frames
from tests.data.video_clips import SIDE, numbers_of, write_clip
from tests.limits import HANG_S

PLAYLISTS = {
    "segment.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:4\n#EXTINF:4,\n{url}\n#EXT-X-ENDLIST\n",
    "itself.m3u8": "#EXTM3U\n" + "#EXT-X-STREAM-INF:BANDWIDTH=1\nitself.m3u8\n" * 100,
    "many.ffconcat": "ffconcat version 1.0\n" + "file secret.mp4\n" * 1000,
    "remote.ffconcat": "ffconcat version 1.0\nfile {url}\n",
    "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
    'mediaPresentationDuration="PT4S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" '
    'bandwidth="1"><BaseURL>{url}</BaseURL></Representation></AdaptationSet></Period></MPD>',
    "show.smil": '<smil><body><video src="{url}"/></body></smil>',
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 96\n"
    "a=rtpmap:96 H264/90000\n",
    "list.asx": '<asx version="3.0"><entry><ref href="{url}"/></entry></asx>',
}

READ_EVERYTHING = """
import os, resource, sys
from megatron_vcr1.data.video import VideoError, read_frames
size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()  # with CUDA, the libraries take 7 GB
resource.setrlimit(resource.RLIMIT_AS, (size + (3 << 30),) * 2)
read_frames("secret.mp4", num_threads=1)
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 3,) * 2)

def peak_kb():
    # Not ru_maxrss, which begins with the memory of the process that started this one.
    return int(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])

before = peak_kb()
for path in sys.argv[1:]:
    try:
        read_frames(path, num_threads=1)
        print("READ", path)
    except VideoError as error:
        print(error)
print(peak_kb() - before < 100_000, len(os.listdir("/proc/self/fd")))
"""


def test_playlists_open_no_files_and_no_connections(tmp_path: Path) -> None:
    write_clip(tmp_path / "secret.mp4", num_frames=8)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        paths = [
            f"tcp:{address}",
            f"http:/{address}/a.ts",
            "concat:secret.mp4|secret.mp4",
            "subfile:secret.mp4",
            "%d.jpg",
        ]
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "1.jpg")
        Image.new("RGB", (SIDE, SIDE)).save(tmp_path / "%d.jpg")
        for name, text in PLAYLISTS.items():
            for path in (name, f"{name}.mp4"):
                (tmp_path / path).write_text(text.replace("{url}", f"http://{address}/a.ts"))
                paths.append(path)
        command = [sys.executable, "-c", READ_EVERYTHING, *paths]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=HANG_S)
        with pytest.raises(BlockingIOError):
            listener.accept()
    *errors, usage = done.stdout.splitlines()
    assert len(errors) == len(paths)
    for path, error in zip(paths, errors, strict=True):
        assert error.startswith(f"{path}: ")
        assert "no such file" in error or "not a video" in error or "a playlist" in error
    assert usage.startswith("True ")


def test_a_remote_playlist_opens_nothing(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "secret.mp4", num_frames=8)
    text = f"ffconcat version 1.0\nfile {clip}\n"
    fsspec.filesystem("memory").pipe("/list.mp4", text.encode())
    with pytest.raises(VideoError, match="a playlist"):
        read_frames("memory://list.mp4")


def _add_cover(container: av.container.OutputContainer) -> tuple[av.VideoStream, av.Packet]:
    content = BytesIO()
    Image.new("RGB", (2 * SIDE, 2 * SIDE), "red").save(content, "jpeg")
    stream = container.add_stream("mjpeg", rate=1)
    stream.width = stream.height = 2 * SIDE
    stream.pix_fmt = "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    packet = av.Packet(content.getvalue())
    packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
    return stream, packet


@pytest.mark.parametrize(("name", "codec"), [("song.mp3", "mp3"), ("song.m4a", "aac"), ("song.flac", "flac")])
def test_a_song_with_a_cover_is_no_video(tmp_path: Path, name: str, codec: str) -> None:
    with av.open(str(tmp_path / name), "w", format="mp4" if name.endswith("m4a") else None) as container:
        sound = container.add_stream(codec, rate=16000, layout="mono")
        _, cover = _add_cover(container)
        container.mux(cover)
        silence = np.zeros((1, 16000), dtype=np.float32 if codec != "flac" else np.int16)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp" if codec != "flac" else "s16", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    with pytest.raises(VideoError, match=r"no video stream, only a cover picture"):
        read_frames(tmp_path / name)


def test_the_video_is_read_and_not_its_larger_cover(tmp_path: Path) -> None:
    plain = write_clip(tmp_path / "plain.mp4")
    path = tmp_path / "covered.mp4"
    with av.open(str(plain)) as old, av.open(str(path), "w") as new:
        _, cover = _add_cover(new)
        stream = new.add_stream_from_template(old.streams.video[0])
        new.mux(cover)
        for packet in (packet for packet in old.demux(video=0) if packet.size):
            packet.stream = stream
            new.mux(packet)
    assert numbers_of(read_frames(path, fps=25).frames) == list(range(40))


def test_frames_of_too_many_pixels_are_not_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.mp4"
    content = BytesIO()
    Image.new("L", (12000, 8000)).save(content, "png")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=1)
        stream.width, stream.height, stream.pix_fmt = 12000, 8000, "gray"
        packet = av.Packet(content.getvalue())
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1)
        container.mux(packet)
    with pytest.raises(VideoError, match=r"more than \d+ pixels"):
        read_frames(path)
