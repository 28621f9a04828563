import pytest

from keras_edifice.backends.peers import PEERS
from keras_edifice.benchmark.operations import Draw, operations
from tests.support.close import assert_close

PAIRS = [(name, label) for name, peers in PEERS.items() for label in peers]


@pytest.mark.parametrize(("name", "label"), PAIRS)
def test_the_operation_beside_ours_computes_the_same(name, label):
    import torch

    (case,) = operations([name])
    ours, arrays = case.make(Draw(batch=2, width=32), 128)
    tensors = [torch.as_tensor(x) for x in arrays]
    assert_close(PEERS[name][label](*tensors), ours(*tensors))
