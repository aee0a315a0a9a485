"""Workers that compute together end together, whoever of them makes a mistake."""

import pytest
import ray
import torch

from vaemo.cluster.group import run_group
from vaemo.errors import UsageError

pytestmark = [pytest.mark.ray, pytest.mark.timeout(120)]


def run(folder, workers, mistaken):
    def work(given):
        rank = ray.train.get_context().get_world_rank()
        if rank in given:
            raise UsageError(f"worker {rank} was asked for what it cannot do")
        if workers > 1:
            torch.distributed.all_reduce(torch.ones(1))
        return {}

    settings = {"gpus": 0.0, "name": "group", "max_failures": 1, "patience_s": 60.0}
    return run_group(work, mistaken, workers=workers, storage=str(folder), **settings)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "mistaken"), [(1, (0,)), (2, (1,))])
def test_a_mistake_of_one_ends_all_who_wait_for_it(local_ray, tmp_path, workers, mistaken):
    with pytest.raises(UsageError, match=f"worker {mistaken[0]} was asked for what it cannot do"):
        run(tmp_path, workers, mistaken)
