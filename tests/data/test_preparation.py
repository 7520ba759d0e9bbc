from __future__ import annotations

from pathlib import Path

from megatron_vcr1.config.data_sections import DataSection
from megatron_vcr1.data.preparation import CachedVideoReader
from tests.data.video_clips import write_clip


def test_all_readers_of_a_process_share_its_cache(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    videos = [CachedVideoReader(DataSection(video_cache_mb=64)).read_frames(str(clip)) for _ in range(2)]
    assert videos[0] is videos[1]
    assert CachedVideoReader(DataSection(video_cache_mb=0)).read_frames(str(clip)) is not videos[0]
