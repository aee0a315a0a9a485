import torch
from model_cases import DIMS, make_features

from vaemo.model.streams import Streams


def test_items_go_in_the_order_of_the_streams_and_skip_absent_ones():
    streams = Streams(speaker=torch.zeros(1, 2, 3), speech=torch.ones(1, 2, 4))
    assert [name for name, _ in streams.items()] == ["speech", "speaker"]


def test_select_steps_step_and_cat():
    streams = make_features(4, 6)
    for name in DIMS:
        x = getattr(streams, name)
        assert torch.equal(getattr(streams.select([2, 0]), name), x[[2, 0]])
        assert torch.equal(getattr(streams.steps(1, 4), name), x[:, 1:4])
        assert torch.equal(getattr(streams.step(5), name), x[:, 5])
        assert torch.equal(getattr(Streams.cat([streams.select([0]), streams.select([1, 2, 3])]), name), x)
        assert torch.equal(getattr(Streams.cat([streams.steps(0, 2), streams.steps(2, 6)], 1), name), x)
        assert getattr(streams.to(torch.float32), name).dtype == torch.float32
