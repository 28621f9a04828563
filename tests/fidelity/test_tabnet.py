import keras
import numpy as np
import pytest
import torch
from pytorch_tabnet.tab_network import TabNet, TabNetPretraining

import keras_edifice
from tests.support.close import assert_close, difference
from tests.support.gradients import gradients
from tests.support.shaking import shake

rng = np.random.default_rng(0)
CATEGORIES = dict(cat_idxs=[1, 4], cat_dims=[3, 5], cat_emb_dim=[2, 3])
SHARED = dict(virtual_batch_size=4, epsilon=1e-15)


def build(**options):
    model = shake(
        keras_edifice.build(
            "tabnet",
            input_size=6,
            hidden_size=5,
            attention_size=4,
            num_steps=3,
            relaxation_factor=1.3,
            **{**SHARED, **options},
        ),
        0.1,
    )
    for weight in model.non_trainable_variables:
        if "moving" in weight.name:
            weight.assign(rng.uniform(0.5, 1.5, weight.shape))
    return model


def peer(cls=TabNet, cat_idxs=(), cat_dims=(), cat_emb_dim=(), **options):
    network = cls(
        6,
        n_d=5,
        n_a=4,
        n_steps=3,
        gamma=1.3,
        cat_idxs=list(cat_idxs),
        cat_dims=list(cat_dims),
        cat_emb_dim=list(cat_emb_dim),
        group_attention_matrix=torch.eye(6),
        **{**SHARED, **options},
    )
    return network.eval()


def pairs(model, network):
    """(our weight, its weight, whether its kernel is ours transposed)."""
    weights = {w.path: w for w in model.weights}
    tabnet = getattr(network, "tabnet", network)
    encoder = tabnet.encoder
    found = []

    def kernel(name, linear):
        found.append((weights[f"{name}/kernel"], linear.weight, True))

    def norm(name, batch_norm):
        for ours, theirs in dict(
            gamma="weight",
            beta="bias",
            moving_mean="running_mean",
            moving_variance="running_var",
        ).items():
            found.append(
                (weights[f"{name}/{ours}"], getattr(batch_norm, theirs), False)
            )

    def transformer(name, theirs):
        gates = [*theirs.shared.glu_layers, *theirs.specifics.glu_layers]
        for i, gate in enumerate(gates):
            norm(f"{name}_gate_{i}", gate.bn.bn)
        for i, gate in enumerate(theirs.specifics.glu_layers):
            kernel(f"{name}_dense_{i}", gate.fc)

    norm("norm", encoder.initial_bn)
    for i, linear in enumerate(encoder.initial_splitter.shared.shared_layers):
        kernel(f"shared_{i}", linear)
    transformer("initial", encoder.initial_splitter)
    for s in range(3):
        transformer(f"step_{s}", encoder.feat_transformers[s])
        kernel(f"attention_{s}/dense", encoder.att_transformers[s].fc)
        norm(f"attention_{s}/norm", encoder.att_transformers[s].bn.bn)
    for i, embedding in zip(
        sorted(model.options["cat_idxs"]),
        getattr(network.embedder, "embeddings", []),
        strict=True,
    ):
        found.append((weights[f"embedding_{i}/embeddings"], embedding.weight, False))
    if hasattr(network, "decoder"):
        kernel(
            "decoder_shared",
            network.decoder.feat_transformers[0].shared.shared_layers[0],
        )
        for s, theirs in enumerate(network.decoder.feat_transformers):
            transformer(f"decoder_{s}", theirs)
        kernel("reconstruction", network.decoder.reconstruction_layer)
    else:
        kernel("predictions", tabnet.final_mapping)
    assert len(found) == len(model.weights)
    return found


def copy_weights(model, network):
    with torch.no_grad():
        for ours, theirs, transposed in pairs(model, network):
            value = ours.value.detach()
            theirs.copy_(value.T if transposed else value)


def loss_gradients(network, x, model, entropy=0.7):
    """Of the sum of squared logits and the entropy, in the order of our weights."""
    x = torch.tensor(x, requires_grad=True)
    logits, negative_entropy = network(x)
    loss = (logits**2).sum() - entropy * negative_entropy
    theirs = {o.path: (t, flip) for o, t, flip in pairs(model, network)}
    wanted = [theirs[w.path] for w in model.trainable_variables]
    *by_weight, by_input = torch.autograd.grad(loss, [*(t for t, _ in wanted), x])
    flipped = [
        g.T if flip else g for g, (_, flip) in zip(by_weight, wanted, strict=True)
    ]
    return [g.numpy() for g in flipped], by_input.numpy()


def table(rows=8):
    x = rng.normal(size=(rows, 6)).astype("float32")
    x[:, 1], x[:, 4] = rng.integers(0, 3, rows), rng.integers(0, 5, rows)
    return x


def differences(mask_type, categories):
    """Of the logits and the entropy, and of their gradients in weights and input."""
    options = dict(num_classes=3, classifier_activation=None, lambda_sparse=0.7)
    model = build(mask_type=mask_type, **options, **categories)
    network = peer(output_dim=3, mask_type=mask_type.removesuffix("15"), **categories)
    copy_weights(model, network)
    x = table()
    logits, negative_entropy = network(torch.tensor(x))
    forward = [
        difference(model(x), logits.detach()),
        difference(sum(model.losses), -0.7 * negative_entropy.detach()),
    ]

    def loss(y):
        return keras.ops.sum(keras.ops.square(y)) + sum(model.losses)

    by_weight, by_input = gradients(model, x, loss)
    their_weights, their_input = loss_gradients(network, x, model)
    ours, theirs = [*by_weight, by_input], [*their_weights, their_input]
    gradient = [difference(a, b) for a, b in zip(ours, theirs, strict=True)]
    return max(forward), max(gradient)


def test_agrees_with_pytorch_tabnet(fidelity):
    cases = [("sparsemax", {}), ("entmax15", {}), ("sparsemax", CATEGORIES)]
    measured = [differences(*case) for case in cases]
    forward, gradient = (max(values) for values in zip(*measured, strict=True))
    fidelity.record("tabnet", "pytorch_tabnet TabNet", forward, gradient)


@pytest.mark.parametrize("categories", [{}, CATEGORIES])
def test_masks_and_importance_agree(categories):
    model = build(num_classes=3, return_masks=True, **categories)
    network = peer(output_dim=3, **categories)
    copy_weights(model, network)
    x = table()
    importance, masks = network.forward_masks(torch.tensor(x))
    masks = torch.stack([masks[s] for s in range(3)], 1).detach()
    # The peer reports columns: a feature is the sum of its columns.
    matrix = (network.embedder.embedding_group_matrix > 0).float()
    y = model(x)
    assert_close(y["masks"], masks @ matrix.T, 1e-4)
    assert_close(y["importance"], importance.detach() @ matrix.T, 1e-4)


def test_training_agrees():
    model = build(num_classes=3, classifier_activation=None)
    network = peer(output_dim=3)
    copy_weights(model, network)
    x = table()
    logits, _ = network.train()(torch.tensor(x))
    # Masked features hardly vary in a virtual batch of four rows, and the division by
    # their deviation multiplies rounding by up to 300.
    assert_close(model(x, training=True), logits.detach(), 1e-3)
    mean = model.get_layer("encoder").get_layer("attention_0").norm.moving_mean
    theirs = network.tabnet.encoder.att_transformers[0].bn.bn.running_mean
    assert_close(mean, theirs, 1e-5)


def test_pretraining_agrees():
    model, network = build(pretraining_ratio=0.3), peer(TabNetPretraining)
    copy_weights(model, network)
    x = table()
    assert_close(model(x)["reconstruction"], network(torch.tensor(x))[0].detach(), 1e-4)
