"""The planner's memory against values computed by hand."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_vcr1.model.presets import model_config
from megatron_vcr1.planning.devices import DEVICES
from megatron_vcr1.planning.job import Job, Layout
from megatron_vcr1.planning.memory import cache_bytes_per_token, engine_memory, host_memory, training_memory
from megatron_vcr1.planning.parameters import stage_parameters
from megatron_vcr1.planning.timing import Pass, stage_seconds

NUM_PARAMETERS_7B = 8_292_166_656 + 20_162_816  # published, and the padding of the vision tower's MLPs
H100 = DEVICES["h100"]


def test_memory_of_the_7b_model_equals_a_calculation_by_hand() -> None:
    """bfloat16 weights, float32 gradients, 12 bytes of optimizer state per parameter, sharded over the replicas."""
    job = Job(model_config("qwen2.5-vl-7b"))
    (memory,) = training_memory(job, Layout(replicas=8, recompute="full"), H100)
    assert memory.parameters == 2 * NUM_PARAMETERS_7B
    assert memory.gradients == 4 * NUM_PARAMETERS_7B
    assert memory.optimizer == 12 * NUM_PARAMETERS_7B / 8
    assert memory.reference == 0
    tokens, patches = 3840 + 8 * 199, 19 * 28 * 28
    # The residual stream of a token in 28 layers, of a patch in 32, and 4 hidden sizes in the merger.
    saved = tokens * 28 * 3584 + patches * (32 * 1280 + 4 * 1280)
    assert memory.activations == pytest.approx(2 * saved)


def test_context_parallelism_divides_activations_and_optimizer_state() -> None:
    prompt_tokens = 64 + 336 * 14**2  # a video of 336 temporal steps, which 2, 3 and 4 ranks divide evenly
    job = Job(model_config("qwen2.5-vl-7b"), prompt_tokens=prompt_tokens, prompts_per_step=2)
    (whole,) = training_memory(job, Layout(replicas=2, recompute="full"), H100)
    (rank,) = training_memory(job, Layout(replicas=2, context=4, recompute="full"), H100)
    assert (rank.parameters, rank.gradients) == (whole.parameters, whole.gradients)
    assert rank.optimizer == whole.optimizer / 4
    assert rank.activations == pytest.approx(whole.activations / 4)  # 8 responses on 4 ranks
    (three,) = training_memory(job, Layout(replicas=2, context=3, recompute="full"), H100)
    tokens, patches = prompt_tokens / 3 + 3 * 199, job.groups(1).patches / 3  # one rank has 3 of the 8 responses
    assert three.activations == pytest.approx(2 * (tokens * 28 * 3584 + patches * (32 * 1280 + 4 * 1280)))


def test_a_resident_reference_takes_the_memory_of_its_weights() -> None:
    job = Job(model_config("qwen2.5-vl-7b"), reference_resident=True)
    (memory,) = training_memory(job, Layout(replicas=8), H100)
    assert memory.reference == 2 * NUM_PARAMETERS_7B


def test_layer_inputs_in_host_memory_leave_two_layers_on_the_gpu() -> None:
    job, layout = Job(model_config("qwen2.5-vl-7b"), offloads_inputs=True), Layout(replicas=8, recompute="full")
    (memory,) = training_memory(job, layout, H100)
    tokens, patches = 3840 + 8 * 199, 19 * 28 * 28
    assert memory.activations == pytest.approx(2 * (tokens * 2 * 3584 + patches * (2 + 4) * 1280))
    assert training_memory(job, Layout(replicas=8), H100) == training_memory(
        dataclasses.replace(job, offloads_inputs=False), Layout(replicas=8), H100
    )


def test_settings_of_the_optimizer_save_memory() -> None:
    job, layout = Job(model_config("qwen2.5-vl-7b")), Layout(replicas=8)
    (default,) = training_memory(job, layout, H100)
    (gradients,) = training_memory(dataclasses.replace(job, gradient_bytes=2), layout, H100)
    assert gradients.gradients == 2 * NUM_PARAMETERS_7B
    (moments,) = training_memory(dataclasses.replace(job, moment_bytes=4), layout, H100)
    assert moments.optimizer == 8 * NUM_PARAMETERS_7B / 8
    in_host = dataclasses.replace(job, optimizer_resident=False)
    (host,) = training_memory(in_host, layout, H100)
    assert host.optimizer == 0 and host.resident == default.resident - default.optimizer
    assert host.working == default.working  # at the time of the step, the activations' memory is free
    (alone,) = training_memory(in_host, Layout(recompute="full"), H100)
    assert alone.activations + alone.working == pytest.approx(12 * NUM_PARAMETERS_7B)


def test_host_memory_equals_a_calculation_by_hand() -> None:
    layout = Layout(replicas=8, recompute="full")
    (default,) = host_memory(Job(model_config("qwen2.5-vl-7b")), layout, H100)
    # Weights, and 12 bytes of optimizer state per parameter: a rank writes an eighth of a checkpoint.
    assert default.checkpoint == pytest.approx((2 + 12) / 8 * NUM_PARAMETERS_7B)
    assert (default.reference, default.optimizer, default.activations) == (2 * NUM_PARAMETERS_7B, 0, 0)
    settings = {"optimizer_resident": False, "offloads_inputs": True, "saves_in_background": False}
    job = Job(model_config("qwen2.5-vl-7b"), **settings, reference_resident=True)
    (most,) = host_memory(job, layout, H100)
    assert most.optimizer == 12 / 8 * NUM_PARAMETERS_7B
    # Inputs of 28 layers, 5,432 x 3,584 values, and of 32 layers, 14,896 x 1,280 values, in buffers of powers of two.
    assert most.activations == 28 * 2**26 + 32 * 2**26
    assert most.total == most.optimizer + most.activations
    first, last = host_memory(job, dataclasses.replace(layout, replicas=4, pipeline=2), H100)
    assert last.activations == 14 * 2**26 and first.activations == 2 * (14 + 32) * 2**26  # two microbatches in flight
    (blocks,) = host_memory(job, dataclasses.replace(layout, recompute_layers=14), H100)
    assert blocks.activations == (2 + 32) * 2**26
    (frozen,) = host_memory(dataclasses.replace(job, freeze=("vision_tower",)), layout, H100)
    assert frozen.activations == 28 * 2**26


def test_a_cpu_has_no_other_memory() -> None:
    settings = {"reference_resident": False, "optimizer_resident": False, "offloads_inputs": True}
    job, layout = Job(model_config("qwen2.5-vl-3b")), Layout(recompute="full")
    in_host = dataclasses.replace(job, **settings)
    resident = dataclasses.replace(job, reference_resident=True)
    assert training_memory(in_host, layout, DEVICES["cpu"]) == training_memory(resident, layout, DEVICES["cpu"])
    (host,) = host_memory(in_host, layout, DEVICES["cpu"])
    assert host.total == host.checkpoint > 0


def test_recomputed_blocks_of_layers_store_fewer_inputs_and_need_more_memory_while_they_are_recomputed() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    layout = Layout(replicas=8, recompute="full")
    (each,) = training_memory(job, layout, H100)
    (blocks,) = training_memory(job, dataclasses.replace(layout, recompute_layers=4), H100)
    tokens = 3840 + 8 * 199
    assert each.activations - blocks.activations == pytest.approx(2 * tokens * 21 * 3584)  # the vision tower's stay
    per_layer = 4 * 3584 + 2 * 3584 + 2 * 512 + 2 * 18944
    assert blocks.working - each.working == pytest.approx(2 * tokens * 3 * per_layer)


def test_features_that_several_updates_use_stay_for_the_whole_step() -> None:
    frozen = Job(model_config("qwen2.5-vl-7b"), freeze=("vision_tower", "merger"), with_reference=False)
    several = dataclasses.replace(frozen, num_minibatches=4, prompts_per_step=16)
    assert several.keeps_features and not frozen.keeps_features
    (memory,) = training_memory(several, Layout(replicas=2), H100)
    (once,) = training_memory(dataclasses.replace(frozen, prompts_per_step=16), Layout(replicas=2), H100)
    features = 8 * 19 * 14 * 14 * 3584 * 2  # of the 8 prompts of a replica
    assert memory.activations - once.activations == pytest.approx(features)


def test_a_frozen_vision_tower_has_no_gradients_and_activations() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    (whole,) = training_memory(job, Layout(replicas=8, recompute="full"), H100)
    frozen_job = dataclasses.replace(job, freeze=("vision_tower",))
    (frozen,) = training_memory(frozen_job, Layout(replicas=8, recompute="full"), H100)
    assert 0.6e9 < (whole.gradients - frozen.gradients) / 4 < 0.7e9  # parameters of the tower
    assert whole.activations - frozen.activations == pytest.approx(2 * 19 * 28 * 28 * 32 * 1280)  # not the merger's


def test_the_last_layer_saves_only_target_tokens_after_its_attention() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    tokens, targets, after_attention = 3840 + 8 * 199, 8 * 200, 2 * 3584 + 2 * 18944
    first, last = training_memory(job, Layout(pipeline=2, replicas=4), H100)
    per_layer = 4 * 3584 + 2 * 3584 + 2 * 512 + 2 * 18944
    assert last.activations == pytest.approx(2 * (tokens * 14 * per_layer - (tokens - targets) * after_attention))
    assert first.activations > 2 * 2 * tokens * 14 * per_layer  # two microbatches in flight, and the vision tower


def test_cache_bytes_per_token() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    assert cache_bytes_per_token(job, 1) == 2 * 28 * 4 * 128 * 2
    assert cache_bytes_per_token(job, 8) == 2 * 28 * 1 * 128 * 2  # fewer key-value heads than ranks: one head per rank


def test_an_engine_that_does_not_fit_has_no_cache() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    engine = engine_memory(job, H100, resident=79e9, ranks=1)
    assert engine.cache < 0 and engine.tokens == 0


def test_the_norms_of_queries_and_keys_save_the_projection() -> None:
    job = Job(model_config("qwen3-vl-8b"))
    plain = dataclasses.replace(job.config.text, qk_norm=False)
    without = dataclasses.replace(job, config=dataclasses.replace(job.config, text=plain))
    (memory,), (expected,) = (training_memory(each, Layout(tensor=2, replicas=4), H100) for each in (job, without))
    tokens, targets = 3840 + 8 * 199, 8 * 200
    assert tokens > targets
    assert memory.activations - expected.activations == pytest.approx(2 * tokens * 36 * (32 + 2 * 8) / 2 * 128)


def test_a_whole_vision_tower_takes_more_memory_for_weights_and_less_time() -> None:
    job = Job(model_config("qwen2.5-vl-7b"))
    sharded = Layout(tensor=4, replicas=2, sequence_parallel=True)
    whole = dataclasses.replace(sharded, vision="data")
    (without,), (memory,) = (training_memory(job, layout, H100) for layout in (sharded, whole))
    (tower,) = stage_parameters(job.config, Layout())
    (shard,) = stage_parameters(job.config, sharded)
    assert memory.parameters - without.parameters == 2 * (tower.vision - shard.vision) > 2 * 2 / 3 * tower.vision
    assert memory.optimizer - without.optimizer == 12 / 2 * (tower.vision - shard.vision)
    # A video of 19 temporal steps: the busiest of 4 ranks encodes 5 of them.
    assert whole.frame_share(job) == 5 / 19 and sharded.frame_share(job) == 1
    seconds = [stage_seconds(job, layout, H100, Pass.TRAINING)[0] for layout in (sharded, whole)]
    assert seconds[1] < 0.95 * seconds[0]
