"""The subcommand `vcr1 data`: import, synthesize and check manifests."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vcr1.cli.arguments import (
    add_task_modules_argument,
    load_task_modules,
    path_argument,
    path_or_url,
    positive,
)
from megatron_vcr1.command_line import HelpFormatter
from megatron_vcr1.data.importers import FORMATS
from megatron_vcr1.data.manifest import write_manifest
from megatron_vcr1.data.rows import is_remote
from megatron_vcr1.errors import UserError
from megatron_vcr1.tasks import BUILT_IN_TASKS

if TYPE_CHECKING:
    from megatron_vcr1.data.check import ManifestCheck
    from megatron_vcr1.data.importers.formats import ImportReport

_MAX_PRINTED = 20


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `data` and its subcommands; each sets `run`, a function of the arguments that returns the exit code."""
    parser = subparsers.add_parser(
        "data",
        help="import, synthesize and check manifests",
        description="A manifest is a file with one sample per line, as a JSON object: a video, a prompt and a target. "
        "Training and evaluation read their data from manifests.",
    )
    commands = parser.add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    _add_import(commands)
    _add_synthesize(commands)
    _add_split(commands)
    _add_check(commands)


def _add_import(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    formats = "\n".join(f"  {name:<16} {description}" for name, description in FORMATS.items())
    parser = commands.add_parser(
        "import",
        help="convert annotations, a published dataset's or your own, to a manifest",
        description="Convert annotations to a manifest. Every row that was repaired or skipped is listed in "
        "OUT.report.json and counted in the summary.\n\nYour own annotations (own) are a table of any columns: "
        "--columns names the key of a manifest row that each column fills, for example sentence=query,file=video,"
        "from=target.start,to=target.end. Columns with the name of a key need not be named. Ids are made, and videos "
        "are measured, where columns for them are missing.",
        epilog=f"formats:\n\n{formats}",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("name", choices=list(FORMATS), metavar="NAME", help="name of the format, see below")
    parser.add_argument(
        "--annotations",
        nargs="+",
        type=path_argument,
        required=True,
        metavar="PATH",
        help="annotation files of the format",
    )
    parser.add_argument(
        "--videos",
        type=path_or_url,
        metavar="DIR",
        help="folder or URL of the videos; rows whose video is missing are skipped",
    )
    parser.add_argument("--out", type=path_argument, required=True, metavar="FILE", help="manifest to write")
    parser.add_argument("--split", help="split to import, for formats whose files contain several")
    parser.add_argument(
        "--task", metavar="TASK", help="task to import for: of your own annotations, or for formats that suit several"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="COLUMN=KEY",
        help="columns of your own annotations, separated by commas or spaces; keys are those of a manifest row "
        "(query, video, duration_s ...), of its target (target.choice ...), or target.start, target.end for a span, "
        "target.answer for the text of the right option, options.0, options.1 ... for options in several columns",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="keep N randomly chosen samples")
    parser.add_argument(
        "--limit-per-video",
        type=positive,
        metavar="N",
        help="keep N randomly chosen samples of each video, before --limit (1: as many samples as videos)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed for the two limits (default: 0)")
    parser.add_argument(
        "--keep-overruns",
        action="store_true",
        help="keep spans that end after the video as annotated, as published scores count them (default: cut them)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run_import)


def _add_synthesize(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "synthesize",
        help="make videos of moving shapes with exact targets",
        description="Make mp4 files of moving shapes and their manifests: train.jsonl, and the held-out test.jsonl, "
        "unseen_pairs.jsonl and longer_events.jsonl.",
    )
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="folder for the videos and manifests"
    )
    parser.add_argument("--num-videos", type=positive, required=True, metavar="N", help="number of training videos")
    parser.add_argument(
        "--num-test-videos",
        type=positive,
        metavar="N",
        help="number of videos of each other split (default: a tenth of --num-videos, at least 6)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed; the same seed gives the same bytes (default: 0)")
    parser.add_argument(
        "--tasks",
        nargs="+",
        choices=BUILT_IN_TASKS,
        metavar="TASK",
        help=f"any of {', '.join(BUILT_IN_TASKS)} (default: the six tasks of the paper)",
    )
    parser.add_argument(
        "--side", type=positive, default=64, metavar="N", help="width and height in pixels (default: 64)"
    )
    parser.add_argument("--num-frames", type=positive, default=24, metavar="N", help="frames per video (default: 24)")
    parser.add_argument("--fps", type=positive, default=2, metavar="N", help="frames per second (default: 2)")
    parser.add_argument("--json", action="store_true", help="print the number of videos and the manifests as JSON")
    parser.set_defaults(run=run_synthesize)


def _add_split(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "split",
        help="split a manifest into training, validation and test parts, by video",
        description="Write DIR/train.jsonl, DIR/validation.jsonl and DIR/test.jsonl. All samples of a video go to the "
        "same part, so that a model is never tested on a video that it was trained on.",
    )
    parser.add_argument("manifest", type=path_argument, metavar="MANIFEST", help="a .jsonl file")
    parser.add_argument("--out", type=path_argument, required=True, metavar="DIR", help="folder of the three manifests")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        default=(0.8, 0.1, 0.1),
        metavar=("TRAIN", "VALIDATION", "TEST"),
        help="fractions of the videos; 0 leaves a part out (default: 0.8 0.1 0.1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random choice (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the number of samples by manifest as JSON")
    add_task_modules_argument(parser)
    parser.set_defaults(run=run_split)


def _add_check(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "check",
        help="validate every row of a manifest, and on request every video",
        description="List the problems of a manifest by line and sample. The exit code is 1 if there are any.",
    )
    parser.add_argument("manifest", type=path_argument, metavar="MANIFEST", help="a .jsonl file")
    parser.add_argument("--videos", action="store_true", help="also decode every video and image as training does")
    parser.add_argument(
        "--num-workers",
        type=positive,
        default=os.cpu_count(),
        metavar="N",
        help="number of files decoded in parallel (default: number of cores)",
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    add_task_modules_argument(parser)
    parser.set_defaults(run=run_check)


def run_import(args: argparse.Namespace) -> int:
    """Import a dataset and write its manifest and report; return 1 if no sample is left."""
    from megatron_vcr1.data.importers.cleaning import VideoFolder
    from megatron_vcr1.data.importers.formats import import_dataset
    from megatron_vcr1.data.importers.own import ColumnMap

    if args.columns and args.name != "own":
        raise UserError(f"--columns {args.columns[0]}: {args.name} has columns of its own; --columns is for own")
    if args.out.is_dir():
        raise UserError(f"--out {args.out}: this is a folder; name the manifest file to write")
    if args.videos and not is_remote(args.videos) and not Path(args.videos).is_dir():
        raise UserError(f"--videos {args.videos}: no such folder")
    if args.name == "got10k" and not args.videos and any(path.suffix == ".json" for path in args.annotations):
        raise UserError("got10k: boxes of a .json belong to certain frames of a sequence; name the folder in --videos")
    samples, report = import_dataset(
        args.name,
        tuple(args.annotations),
        VideoFolder(args.videos),
        split=args.split,
        task=args.task,
        columns=ColumnMap.parse(args.columns),
        keep_overruns=args.keep_overruns,
        limit=args.limit,
        limit_per_video=args.limit_per_video,
        seed=args.seed,
    )
    report_file = args.out.with_name(args.out.name + ".report.json")
    if samples:  # do not replace an earlier manifest by an empty one
        write_manifest(args.out, samples)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    content = json.dumps(report.as_json(), indent=1, ensure_ascii=False) + "\n"
    # Half of a surrogate pair has no UTF-8 encoding; it is written as an escape sequence, as in JSON.
    report_file.write_text(content, encoding="utf-8", errors="backslashreplace")
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
    table = Table("problem", "action", "rows", "example", title=f"{report.format}: {report.num_rows} rows")
    for kind, count in rows.most_common():
        example = f"{examples[kind].row_id}: {examples[kind].detail}"
        table.add_row(*kind, str(count), escape(example.encode(errors="backslashreplace").decode()))
    if report.issues:
        console.print(table)
    if not report.videos_checked:
        print("without --videos, no file was looked for; video paths are relative to the manifest's folder")


def run_synthesize(args: argparse.Namespace) -> int:
    """Write synthetic videos and their manifests."""
    from tqdm import tqdm

    from megatron_vcr1.data.scenes import PAPER_TASKS, SPLITS, VideoFormat
    from megatron_vcr1.data.synthesize import synthesize

    num_test_videos = args.num_test_videos or max(args.num_videos // 10, 6)
    videos = synthesize(
        args.out,
        num_videos=args.num_videos,
        num_test_videos=num_test_videos,
        seed=args.seed,
        video_format=VideoFormat(args.side, args.num_frames, args.fps),
        tasks=args.tasks or PAPER_TASKS,
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


def run_split(args: argparse.Namespace) -> int:
    """Split a manifest."""
    from megatron_vcr1.data.manifest import read_manifest
    from megatron_vcr1.data.split import split_by_video

    load_task_modules(args)
    fractions = dict(zip(("train", "validation", "test"), args.fractions, strict=True))
    samples = read_manifest(args.manifest)
    parts = split_by_video(samples, fractions, seed=args.seed, folder=args.manifest.absolute().parent)
    for name in parts:
        if (args.out / f"{name}.jsonl").absolute() == args.manifest.absolute():
            raise UserError(f"--out {args.out}: {name}.jsonl there is the manifest to split; name another folder")
    for name, part in parts.items():
        write_manifest(args.out / f"{name}.jsonl", part)
    if args.json:
        print(json.dumps({str(args.out / f"{name}.jsonl"): len(part) for name, part in parts.items()}))
    else:
        for name, part in parts.items():
            num_files = len({medium.path for sample in part for medium in sample.media})
            print(f"{args.out / name}.jsonl: {len(part)} samples of {num_files} videos and images")
    return 0


def run_check(args: argparse.Namespace) -> int:
    """Check a manifest and print its problems; return 1 if there are any."""
    from tqdm import tqdm

    from megatron_vcr1.data.check import check_manifest

    load_task_modules(args)
    check = check_manifest(
        args.manifest,
        decode_media=args.videos,
        num_workers=args.num_workers,
        progress=lambda files, total: tqdm(files, total=total, desc="files", unit="file"),
    )
    if args.json:
        print(json.dumps(check.as_json(), ensure_ascii=False))
    else:
        _print_check(check)
    return 0 if check.passed else 1


def _print_check(check: ManifestCheck) -> None:
    for row in check.bad_rows[:_MAX_PRINTED]:
        print(f"{check.manifest}, line {row.line}: {row.problem}")
    for bad in check.bad_media[:_MAX_PRINTED]:
        print(f"sample {bad.id}: {bad.path}: {bad.reason}")
    for late in check.late_spans[:_MAX_PRINTED]:
        print(f"sample {late.id}: {late.video}: lasts {late.duration_s:.2f} s, but a span ends at {late.end_s} s")
    if max(len(check.bad_rows), len(check.bad_media), len(check.late_spans)) > _MAX_PRINTED:
        print(f"only the first {_MAX_PRINTED} are shown; --json lists all")
    tasks = ", ".join(f"{count} {task}" for task, count in check.num_samples_by_task.items()) or "no sample"
    print(f"{check.num_rows} rows: {tasks}; {len(check.bad_rows)} bad rows")
    if set(check.num_samples_by_media) - {"1 video"}:
        print("; ".join(f"{count} samples with {media}" for media, count in check.num_samples_by_media.items()))
    if check.num_overruns:
        print(f"{check.num_overruns} samples have a span that ends after duration_s")
    if check.media_decoded:
        print(f"{len(check.bad_media)} samples with a bad video or image")
    if check.late_spans:
        print(f"{len(check.late_spans)} samples have a span that ends after the video")
