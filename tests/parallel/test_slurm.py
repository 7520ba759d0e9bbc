from __future__ import annotations

import pytest

from megatron_vcr1.parallel.slurm import expand_counts, expand_hosts, rank_variables

TASK = {  # the eleventh of 16 tasks on two nodes, as srun describes it
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_STEP_NODELIST": "gpu[007,012]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "10",
    "SLURM_LOCALID": "2",
}


def test_a_task_of_a_step_gets_the_variables_of_its_rank():
    assert rank_variables(TASK) == {
        "RANK": "10",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "gpu007",
        "MASTER_PORT": str(10_000 + (4242 * 8 + 1) % 19_000),
    }


def test_all_tasks_agree_on_the_master_and_each_step_has_its_own_port():
    masters = [rank_variables(TASK | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank // 8)}) for rank in range(16)]
    assert len({(master["MASTER_ADDR"], master["MASTER_PORT"]) for master in masters}) == 1
    ports = {
        int(rank_variables(TASK | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})["MASTER_PORT"])
        for job in range(500, 600)
        for step in range(8)
    }
    assert len(ports) == 800 and min(ports) >= 10_000 and max(ports) < 30_000


@pytest.mark.parametrize(
    "changed",
    [
        {"RANK": "0"},  # torchrun inside srun
        {"SLURM_STEP_ID": None},  # the batch script itself
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
    ],
)
def test_other_processes_get_no_variables(changed):
    environment = {key: value for key, value in (TASK | changed).items() if value is not None}
    assert rank_variables(environment) == {}


def test_master_address_and_port_of_the_user_are_kept():
    named = rank_variables(TASK | {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"})
    assert (named["MASTER_ADDR"], named["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize("visible, local_rank", [("0,1,2,3,4,5,6,7", "2"), ("5", "0"), ("", "2")])
def test_local_rank_is_0_for_a_task_that_sees_only_its_own_gpu(visible, local_rank):
    assert rank_variables(TASK | {"CUDA_VISIBLE_DEVICES": visible})["LOCAL_RANK"] == local_rank


@pytest.mark.parametrize(
    "text, hosts",
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[08-10,12],login", ["gpu08", "gpu09", "gpu10", "gpu12", "login"]),
        ("rack[1-2]n[0,3]", ["rack1n0", "rack1n3", "rack2n0", "rack2n3"]),
        ("n[099-101].cluster", ["n099.cluster", "n100.cluster", "n101.cluster"]),
        ("a-b-[1,2],c-3", ["a-b-1", "a-b-2", "c-3"]),
    ],
)
def test_expand_hosts(text, hosts):
    assert expand_hosts(text) == hosts


@pytest.mark.parametrize("text", ["", ",", "n[1", "n]1", "n[]", "n[a-b]", "n[1-]", "n1,,n2", "n[1[2]]"])
def test_malformed_host_lists_are_rejected(text):
    with pytest.raises(ValueError, match="is not a Slurm"):
        expand_hosts(text)


def test_expand_counts():
    assert expand_counts("8(x2),4,1(x3)") == [8, 8, 4, 1, 1, 1]
    with pytest.raises(ValueError, match="not a Slurm list of counts"):
        expand_counts("8(2)")
