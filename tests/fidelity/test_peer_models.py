import numpy as np
import pytest

import keras_edifice
from keras_edifice.backends.peer_models import PEER_MODELS, PeerModel
from keras_edifice.samples import sample_inputs

SIZES = {  # that these implementations can have
    "resnet": dict(image_size=32, depth=18, hidden_size=4),
    "vit": dict(image_size=8, patch_size=4, embed_size=8, num_layers=1, num_heads=2),
    "swin": dict(
        image_size=32, embed_size=4, depths=[1, 2], num_heads=[1, 2], window_size=4
    ),
    "convnext": dict(image_size=16, depths=[1, 2], hidden_sizes=[4, 6]),
}
IMAGES = [
    (name, label)
    for name, peers in PEER_MODELS.items()
    for label in peers
    if keras_edifice.info(name).kind == "image"
]


@pytest.mark.parametrize(("name", "label"), IMAGES)
def test_the_classifier_beside_ours_has_as_many_weights(name, label):
    model = keras_edifice.build(name, **SIZES[name], num_classes=3)
    x = sample_inputs(model, 2)
    y = np.zeros((2, 3), "float32")
    peer = PeerModel(PEER_MODELS[name][label](model.options), x, y)
    weights = sum(p.numel() for p in peer.module.parameters())
    assert weights == sum(np.prod(v.shape) for v in model.trainable_variables)
    assert peer.forward().shape == (2, 3)
    losses = [peer.train() for _ in range(5)]
    assert losses[-1] < losses[0]
