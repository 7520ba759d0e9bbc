"""Importers convert published annotations to manifests.

`formats` selects the reader of a format, `captioning`, `grounding`, `own`, `questions`, `reasoning` and `tracking`
contain the readers, `files` reads annotation files, and `cleaning` repairs or skips bad rows and reports each of them.
"""

from __future__ import annotations

FORMATS = {
    "own": "any task (--task); .json, .jsonl, .csv or .parquet with your own columns (--columns)",
    "charades_sta": "grounding; the split's .txt and the lengths' .csv (columns id, length), or one .json",
    "activitynet": "grounding; .json of {video: {duration, timestamps, sentences}}",
    "qvhighlights": "grounding with several spans; .jsonl of qid, query, vid, duration, relevant_windows",
    "got10k": "tracking; the folder of sequences (--split: its subfolder), or .json of path, object, gt",
    "nextgqa": "grounded QA (or --task multiple_choice_qa); .csv, gsub_*.json, map_vid_vidorID.json, or one .json",
    "mvbench": "QA; the folder of .json files (--split: a sub-task)",
    "videomme": "QA; the .parquet file (--split: short, medium or long)",
    "perception_test": "QA; .json of {video: {metadata, mc_question}} (--split: the metadata's)",
    "vidtab_quality": "quality; .json of video, instruction, answer",
    "carebench": "captioning; .json or .jsonl of video, caption; FIBER-1k too",
    "dream1k": "captioning; .jsonl (--split: a source, e.g. DREAM/videvo)",
    "video_r1": "several tasks; .json of problem, problem_type, data_type, options, solution, path",
    "videochat_r1_5": "several tasks; .json lists of video, question, options, answer, glue, or the index of them",
    "huggingface": "any task; .jsonl, .json, .parquet, .arrow or a saved dataset's folder, columns as in a manifest",
}
"""Description of each format by name: its task, the files of `--annotations`, and the meaning of `--split`."""
