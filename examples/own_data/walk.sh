#!/usr/bin/env bash
# From a folder of clips and a table of their events to a trained model, its answers and its report:
#
#   bash examples/own_data/walk.sh CLIPS TABLE OUT VIDEO QUERY [--section.key VALUE ...]
#
# TABLE is a .json, .jsonl, .csv or .parquet file like examples/own_data/table.json, with the columns video, sentence,
# start and end; OUT is a folder for everything that is written; the trained model is asked for QUERY in VIDEO. The
# options are settings of the training. It runs on one GPU. On a node of 8 GPUs, set
#   CONFIG=examples/configs/own_data.toml LAUNCH="torchrun --nproc-per-node 8 --no-python"
set -euo pipefail
clips=$1 table=$2 out=$3 video=$4 query=$5
settings=("${@:6}") config=${CONFIG:-examples/configs/own_data_one_gpu.toml}

vcr1 data import own --task temporal_grounding --annotations "$table" --videos "$clips" --columns sentence=query,start=target.start,end=target.end --out "$out/all.jsonl"
vcr1 data split "$out/all.jsonl" --out "$out"
vcr1 data check "$out/train.jsonl" --videos
${LAUNCH:-} vcr1 train "$config" --data.sources.0.manifest "$out/train.jsonl" --train.run_dir "$out/sft" "${settings[@]}"
${LAUNCH:-} vcr1 evaluate --run "$out/sft" --manifest "$out/test.jsonl"
vcr1 generate --run "$out/sft" --video "$video" --query "$query"
vcr1 report "$out/sft"
