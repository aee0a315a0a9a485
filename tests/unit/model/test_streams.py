import torch
from model_cases import DIMS, make_features

from vaemo.model.streams import Streams


def test_items_go_in_the_order_of_the_streams_and_skip_absent_ones():
    streams = Streams(speaker=torch.zeros(1, 2, 3), speech=torch.ones(1, 2, 4))
    assert [name for name, _ in streams.items()] == ["speech", "speaker"]


def test_select_steps_step_and_cat():
    streams = make_features(4, 6)
    assert list(streams.tensors()) == [*DIMS, *streams.past]
    assert streams.past
    for name, x in streams.tensors().items():
        assert torch.equal(streams.select([2, 0]).tensors()[name], x[[2, 0]])
        assert torch.equal(streams.steps(1, 4).tensors()[name], x[:, 1:4])
        assert torch.equal(streams.step(5).tensors()[name], x[:, 5])
        assert torch.equal(Streams.cat([streams.select([0]), streams.select([1, 2, 3])]).tensors()[name], x)
        assert torch.equal(Streams.cat([streams.steps(0, 2), streams.steps(2, 6)], 1).tensors()[name], x)
        assert streams.to(torch.float32).tensors()[name].dtype == torch.float32
        assert list(streams.pick([name]).tensors()) == [name]
