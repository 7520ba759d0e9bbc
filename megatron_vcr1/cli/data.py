"""``vcr1 data import``, ``synthesize`` and ``check``."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from megatron_vcr1.cli.arguments import positive
from megatron_vcr1.data.importers import FORMATS
from megatron_vcr1.data.manifest import BadRow, is_remote, scan_manifest, write_manifest
from megatron_vcr1.errors import UserError
from megatron_vcr1.types import Task, VideoSample

if TYPE_CHECKING:
    from megatron_vcr1.data.importers.formats import ImportReport
    from megatron_vcr1.data.video_process import VideoReader

_MAX_PRINTED = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``data`` and its subcommands; each sets ``run``, which takes the arguments and returns the exit code."""
    parser = subparsers.add_parser(
        "data",
        help="import, synthesize and check manifests",
        description="A manifest is a file of samples, one JSON object a line: a video, what is asked about it, and the "
        "truth. Training and evaluation read nothing else.",
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_import(commands)
    _add_synthesize(commands)
    _add_check(commands)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    formats = "\n".join(f"  {name:<16} {description}" for name, description in FORMATS.items())
    parser = commands.add_parser(
        "import",
        help="turn a published dataset's annotations into a manifest",
        description="Turn a published dataset's annotations into a manifest. Every row that was repaired or skipped is "
        "listed in OUT.report.json and counted in the summary.",
        epilog=f"formats:\n{formats}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(FORMATS), metavar="NAME", help="the format, see below")
    parser.add_argument(
        "--annotations", nargs="+", type=Path, required=True, metavar="PATH", help="the files that the format needs"
    )
    parser.add_argument("--videos", metavar="DIR", help="folder or fsspec URL of the videos; rows without are skipped")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the manifest to write")
    parser.add_argument("--split", help="the part to import, for formats whose files hold several")
    parser.add_argument("--limit", type=positive, metavar="N", help="keep a random choice of N samples")
    parser.add_argument("--seed", type=int, default=0, help="of the choice (default: 0)")
    parser.add_argument(
        "--keep-overruns",
        action="store_true",
        help="leave spans that end after the video as annotated, as published scores count them (default: cut)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run_import)


def _add_synthesize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "synthesize",
        help="make videos of moving shapes with exact truth, for all tasks",
        description="Make mp4 files of moving shapes and their manifests: train.jsonl; and held out test.jsonl, "
        "unseen_pairs.jsonl and longer_events.jsonl.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the videos and manifests")
    parser.add_argument("--num-videos", type=positive, required=True, metavar="N", help="videos of the split train")
    parser.add_argument(
        "--num-test-videos",
        type=positive,
        metavar="N",
        help="videos of each other split (default: N / 10, at least 6)",
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes (default: 0)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=[str(task) for task in Task],
        default=[str(task) for task in Task],
        metavar="TASK",
        help=f"any of {', '.join(Task)} (default: all)",
    )
    parser.add_argument(
        "--side", type=positive, default=64, metavar="N", help="width and height in pixels (default: 64)"
    )
    parser.add_argument("--num-frames", type=positive, default=24, metavar="N", help="frames of a video (default: 24)")
    parser.add_argument("--fps", type=positive, default=2, metavar="N", help="frames a second (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the number of videos and the manifests as JSON")
    parser.set_defaults(run=run_synthesize)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="validate every row of a manifest, and on request every video",
        description="List what is wrong with a manifest, by line and sample. Exit code 0 if nothing is, otherwise 1.",
    )
    parser.add_argument("manifest", type=Path, metavar="MANIFEST", help="a .jsonl file")
    parser.add_argument("--videos", action="store_true", help="also decode every video as training does")
    parser.add_argument(
        "--num-workers",
        type=positive,
        default=os.cpu_count(),
        metavar="N",
        help="videos decoded at once (default: cores)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run_check)


def run_import(args: argparse.Namespace) -> int:
    from megatron_vcr1.data.importers.cleaning import VideoFolder
    from megatron_vcr1.data.importers.formats import import_dataset

    if args.out.is_dir():
        raise UserError(f"{args.out}: is a folder; name the manifest to write")
    if args.videos and not is_remote(args.videos) and not Path(args.videos).is_dir():
        raise UserError(f"--videos {args.videos}: no such folder")
    samples, report = import_dataset(
        args.name,
        tuple(args.annotations),
        VideoFolder(args.videos),
        split=args.split,
        keep_overruns=args.keep_overruns,
        limit=args.limit,
        seed=args.seed,
    )
    report_file = args.out.with_name(args.out.name + ".report.json")
    if samples:  # an earlier manifest is worth more than an empty one
        write_manifest(args.out, samples)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
    report_file.write_text(content, encoding="utf-8", errors="backslashreplace")  # as JSON writes half a character
    if args.json:
        print(json.dumps(report.as_json()))
        return 0 if samples else 1
    _print_import(report)
    written = f"{len(samples)} of {report.num_rows} rows written to {args.out}" if samples else "nothing written"
    print(f"{written}, all issues to {report_file}")
    return 0 if samples else 1


def _print_import(report: ImportReport) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    rows = Counter((issue.problem, issue.action) for issue in report.issues)
    examples = {(issue.problem, issue.action): issue for issue in reversed(report.issues)}
    table = Table("problem", "done", "rows", "for example", title=f"{report.format}: {report.num_rows} rows")
    for kind, count in rows.most_common():
        example = f"{examples[kind].row_id}: {examples[kind].detail}"
        table.add_row(*kind, str(count), escape(example.encode(errors="backslashreplace").decode()))
    if report.issues:
        console.print(table)
    if not report.videos_checked:
        print("without --videos the files were not looked for; video names count from the manifest's folder")


def run_synthesize(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from megatron_vcr1.data.synthesize import SPLITS, VideoFormat, synthesize

    num_test_videos = args.num_test_videos or max(args.num_videos // 10, 6)
    videos = synthesize(
        args.out,
        num_videos=args.num_videos,
        num_test_videos=num_test_videos,
        seed=args.seed,
        video_format=VideoFormat(args.side, args.num_frames, args.fps),
        tasks=[Task(task) for task in args.tasks],
    )
    num_videos = args.num_videos + (len(SPLITS) - 1) * num_test_videos
    for _ in tqdm(videos, total=num_videos, desc="videos", unit="video"):
        pass
    manifests = {split: str(args.out / f"{split}.jsonl") for split in SPLITS}
    if args.json:
        print(json.dumps({"num_videos": num_videos, "manifests": manifests}))
    else:
        print(f"{num_videos} videos; manifests: {', '.join(manifests.values())}")
    return 0


def run_check(args: argparse.Namespace) -> int:
    rows = list(scan_manifest(args.manifest))
    samples = [row for row in rows if isinstance(row, VideoSample)]
    bad_rows = [row for row in rows if isinstance(row, BadRow)]
    bad_videos = list(_bad_videos(samples, args.num_workers)) if args.videos else []
    result: dict[str, Any] = {
        "manifest": str(args.manifest),
        "num_rows": len(rows),
        "num_samples_by_task": dict(Counter(str(sample.task) for sample in samples)),
        "num_overruns": sum(_overruns(sample) for sample in samples),
        "bad_rows": [asdict(row) for row in bad_rows],
        "videos_decoded": args.videos,
        "bad_videos": bad_videos,
    }
    good = bool(samples) and not bad_rows and not bad_videos
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    else:
        _print_check(result)
    return 0 if good else 1


def _bad_videos(samples: list[VideoSample], num_workers: int) -> Iterator[dict[str, str]]:
    """Decodes every video once; yields id, video and reason for the samples that cannot be used."""
    from tqdm import tqdm

    from megatron_vcr1.data.video_process import VideoReader

    samples_of_video: dict[str | tuple[str, ...], list[VideoSample]] = {}
    for sample in samples:
        samples_of_video.setdefault(sample.video, []).append(sample)
    readers: SimpleQueue[VideoReader] = SimpleQueue()

    def problems(samples: list[VideoSample]) -> list[dict[str, str]]:
        reader = readers.get()
        try:
            return _video_problems(samples, reader)
        finally:
            readers.put(reader)

    with ExitStack() as stack, ThreadPoolExecutor(num_workers) as pool:
        for _ in range(num_workers):
            readers.put(stack.enter_context(VideoReader()))
        found = pool.map(problems, samples_of_video.values())
        for bad in tqdm(found, total=len(samples_of_video), desc="videos", unit="video"):
            yield from bad


def _video_problems(samples: list[VideoSample], reader: VideoReader) -> list[dict[str, str]]:
    """Which of one video's samples cannot be used, and why."""
    from megatron_vcr1.data.video import VideoError

    video = samples[0].video
    try:
        duration_s = reader.read_frames(video, num_threads=1).duration_s
    except VideoError as error:
        return [{"id": sample.id, "video": str(video), "reason": error.reason} for sample in samples]
    problems = []
    for sample in samples:
        spans = sample.intervals if sample.clip is None else (sample.clip,)
        if late := [span.start_s for span in spans if span.start_s >= duration_s]:
            reason = f"lasts {duration_s:.2f} s, but an annotated span starts at {late[0]} s"
            problems.append({"id": sample.id, "video": str(video), "reason": reason})
    return problems


def _overruns(sample: VideoSample) -> bool:
    return sample.duration_s is not None and any(span.end_s > sample.duration_s for span in sample.intervals)


def _print_check(result: dict[str, Any]) -> None:
    for bad in result["bad_rows"][:_MAX_PRINTED]:
        print(f"{result['manifest']}, line {bad['line']}: {bad['problem']}")
    for bad in result["bad_videos"][:_MAX_PRINTED]:
        print(f"sample {bad['id']}: {bad['video']}: {bad['reason']}")
    if max(len(result["bad_rows"]), len(result["bad_videos"])) > _MAX_PRINTED:
        print(f"the first {_MAX_PRINTED} are shown; --json lists all")
    tasks = ", ".join(f"{count} {task}" for task, count in result["num_samples_by_task"].items()) or "no sample"
    print(f"{result['num_rows']} rows: {tasks}; {len(result['bad_rows'])} bad rows")
    if result["num_overruns"]:
        print(f"{result['num_overruns']} samples have a span that ends after the video")
    if result["videos_decoded"]:
        print(f"{len(result['bad_videos'])} samples whose video is bad")
